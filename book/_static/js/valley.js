// Two starts in one valley: move the rate, see where each path ends. The formulas are those of the
// lab of the chapter on optimisation; without this script the static figure above it says the same.

const valley = (() => {
  const CURVATURES = [1, 10];
  const STARTS = [["good start", [-0.7, 0.35]], ["random start", [-4, -1.2]]];
  const STEPS = 50;

  const rules = {
    "gradient descent": () => (g, lr) => g.map((x) => lr * x),
    "with momentum 0.9": () => {
      let v = [0, 0];
      return (g, lr) => {
        v = v.map((old, i) => 0.9 * old + g[i]);
        return v.map((x) => lr * x);
      };
    },
    Adam: () => {
      let m = [0, 0], s = [0, 0], t = 0;
      return (g, lr) => {
        t += 1;
        m = m.map((old, i) => 0.9 * old + 0.1 * g[i]);
        s = s.map((old, i) => 0.999 * old + 0.001 * g[i] ** 2);
        return m.map((x, i) =>
          lr * x / (1 - 0.9 ** t) / (Math.sqrt(s[i] / (1 - 0.999 ** t)) + 1e-8));
      };
    },
  };

  const loss = (w) => w.reduce((sum, x, i) => sum + CURVATURES[i] * x * x / 2, 0);

  function path(rule, start, lr, steps = STEPS) {
    const step = rules[rule](), found = [start];
    for (let t = 0; t < steps; t += 1) {
      const w = found[t], move = step(w.map((x, i) => CURVATURES[i] * x), lr);
      found.push(w.map((x, i) => x - move[i]));
    }
    return found;
  }

  const svg = (name, given, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(given)) node.setAttribute(key, value);
    parent.append(node);
    return node;
  };
  const html = (name, given, parent) => {
    const node = Object.assign(document.createElement(name), given);
    parent.append(node);
    return node;
  };
  // Far outside the picture a point only has to be far outside.
  const at = (w) => w.map((x, i) => Math.max(-40, Math.min(40, i ? -x : x)).toFixed(4)).join(",");
  const short = (x) => (x > 1e4 || x < 1e-3 ? x.toExponential(1) : x.toPrecision(2));

  function build(box) {
    const controls = html("div", { className: "tk-valley-controls" }, box);
    const label = html("label", { textContent: "Learning rate " }, controls);
    const slider = html("input", { type: "range", min: -3, max: 0, step: 0.05, value: -2 }, label);
    // The value is spoken by the slider itself: the visible one is no second live region.
    const shown = html("output", {}, label);
    shown.setAttribute("aria-hidden", "true");
    const choice = html("label", { textContent: "Rule " }, controls);
    const select = html("select", {}, choice);
    for (const rule of Object.keys(rules)) html("option", { textContent: rule }, select);

    const picture = svg("svg", { viewBox: "-4.8 -1.9 6.4 3.8", "aria-hidden": "true" }, box);
    for (const level of [0.05, 0.3, 1, 3, 7, 12]) {
      const [rx, ry] = CURVATURES.map((kappa) => Math.sqrt(2 * level / kappa));
      svg("ellipse", { class: "tk-contour", rx, ry }, picture);
    }
    svg("circle", { class: "tk-minimum", r: 0.05 }, picture);
    const lines = STARTS.map(([, start], i) => {
      svg("circle", { class: `tk-start tk-path-${i}`, r: 0.09, cx: start[0], cy: -start[1] }, picture);
      return svg("polyline", { class: `tk-path tk-path-${i}` }, picture);
    });
    const told = html("p", { className: "tk-valley-told" }, box);
    told.setAttribute("role", "status");

    function draw() {
      const lr = 10 ** Number(slider.value);
      shown.textContent = lr.toPrecision(2);
      slider.setAttribute("aria-valuetext", shown.textContent);
      const ends = STARTS.map(([name, start], i) => {
        const points = path(select.value, start, lr);
        lines[i].setAttribute("points", points.map(at).join(" "));
        return `${name} (${i ? "dashed" : "solid"}): ${short(loss(start))}, ${short(loss(points.at(-1)))}`;
      });
      told.textContent = `Loss before and after ${STEPS} steps: ${ends.join("; ")}.`;
    }
    slider.addEventListener("input", draw);
    select.addEventListener("input", draw);
    draw();
    box.hidden = false;
  }

  return { build, path, loss };
})();

for (const box of document.querySelectorAll(".tk-valley")) valley.build(box);
