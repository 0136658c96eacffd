// Three repairs of the theme, without which a page is not whole when opened from a file or without a mouse.

// Opened from a file, the search page may not read other pages to show an extract of each result.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// The arrows that unfold a chapter in the side bar have no name for a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  for (const arrow of document.querySelectorAll("nav details > summary")) {
    const link = arrow.closest("li")?.querySelector("a");
    arrow.setAttribute("aria-label", `Parts of ${link?.textContent.trim() ?? "this chapter"}`);
  }
});

// A formula or an output that is wider than its box scrolls inside it: the keyboard must reach it.
const WIDE = "div.math, mjx-container[display], .cell_output .output";
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const box of document.querySelectorAll(WIDE)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
