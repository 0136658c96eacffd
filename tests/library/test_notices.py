"""The notice of third-party material says what the manifest says, and nothing else."""

from __future__ import annotations

import tomllib

from tools import notices

MANIFEST = tomllib.loads(notices.MANIFEST.read_text(encoding="utf-8"))


def test_the_committed_notice_is_what_the_manifest_generates():
    assert notices.NOTICE.read_text(encoding="utf-8") == notices.notice(MANIFEST)


def test_every_asset_and_every_archive_is_in_the_notice():
    text = notices.notice(MANIFEST)
    for name, asset in MANIFEST["assets"].items():
        assert f"### {name}\n" in text
        assert asset["licence"] in text
    for archive, package in MANIFEST["archives"].items():
        assert f"`{archive}` {package['version']}" in text


def test_the_check_fails_when_the_file_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notices, "NOTICE", tmp_path / "THIRD_PARTY.md")
    assert notices.main(["--check"]) == 1
    assert "python -m tools.notices" in capsys.readouterr().out
    assert notices.main([]) == 0
    assert notices.main(["--check"]) == 0
    notices.NOTICE.write_text("something else", encoding="utf-8")
    assert notices.main(["--check"]) == 1
