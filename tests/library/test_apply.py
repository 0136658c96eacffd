"""A saved classifier in use: the same answer from a call, a command line, a page and a program."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import classifiers
import numpy as np
import pytest
from torch import nn

import transferkit as tk
from transferkit import apply

TEXTS = ["很好的书", "房间不好，不再来"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small fine-tuned BERT of eleven characters."""
    return classifiers.saved(
        tmp_path_factory.mktemp("apply"), "很好的书房间不再来，。", TEXTS * 8, [1, 0] * 8,
        labels=["bad <b>", "good"], length=8, epochs=20,
        notes={"Limitations": "It knows 11 characters & no more."},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(saved):
    with classifiers.served(saved) as server:
        yield server


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    body = body.encode() if isinstance(body, str) else body
    connection.request(method, path, body, {"Host": "127.0.0.1", **headers})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response, text


def form(text):
    return urllib.parse.urlencode({"text": text})


def test_an_answer_names_the_likeliest_label_and_its_probability(saved):
    model = tk.load(saved)
    said = tk.predict(model, tk.data.texts(TEXTS, None, model.prepare.tokenizer, 8))
    found = apply.answer(model, TEXTS)
    assert [one.label for one in found] == ["good", "bad <b>"]
    assert np.allclose([one.logits for one in found], said.logits, atol=1e-6)
    assert np.allclose([one.probability for one in found], said.probabilities.max(1), atol=1e-6)


def test_an_answer_says_what_was_not_known_and_not_read(saved):
    short, strange, long = apply.answer(tk.load(saved), ["很好", "好吃", "很好的书" * 9])
    assert (short.read, short.unknown, short.cut) == (4, 0, False)
    assert (strange.read, strange.unknown, strange.cut) == (4, 1, False)
    assert (long.read, long.unknown, long.cut) == (8, 0, True)


@pytest.mark.parametrize(
    ("name", "text"), [("minilm-l6", "a \u4e6b book"), ("e5-small", "\U00013000")]
)
def test_the_shipped_models_say_which_token_stands_for_the_unknown(name, text):
    model = tk.models.load(name, labels=["no", "yes"], layers=1, pretrained=False)
    assert apply.answer(model, [text])[0].unknown == 1


def test_what_is_no_classifier_of_texts_is_refused():
    with pytest.raises(TypeError, match="no classifier of texts"):
        apply.answer(nn.Linear(4, 2), ["好"])


def test_one_string_is_refused_where_a_list_is_meant(saved):
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        apply.answer(tk.load(saved), "好")


@pytest.mark.parametrize(("texts", "message"), [([], "are empty"), (["好", "\ud800"], "texts.1.")])
def test_what_no_tokenizer_can_read_is_refused(saved, texts, message):
    with pytest.raises(ValueError, match=message):
        apply.answer(tk.load(saved), texts)


def test_a_fresh_process_gives_the_same_logits_from_the_command_line(saved):
    command = [sys.executable, "-m", "transferkit.apply", "predict", str(saved), *TEXTS]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    lines = [json.loads(line) for line in said.splitlines()]
    here = apply.answer(tk.load(saved), TEXTS)
    assert [line["text"] for line in lines] == TEXTS
    assert np.allclose([line["logits"] for line in lines], [one.logits for one in here], atol=1e-5)
    assert [line["label"] for line in lines] == [one.label for one in here]


def test_lines_of_the_standard_input_are_answered_too(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", iter(["很好\n", "\n", "不好\n"]))
    assert apply.main(["predict", str(saved)]) == 0
    said = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["很好", "不好"]


def test_nothing_to_answer_and_no_model_end_with_a_message(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", iter([]))
    assert apply.main(["predict", str(saved)]) == 1
    assert "there is no text" in capsys.readouterr().err
    assert apply.main(["predict", str(tmp_path), "好"]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_the_page_answers_and_its_form_is_empty_again(server):
    response, page = ask(server, "POST", "/", form("很好的书"))
    assert response.status == 200
    assert "Answer: <output>good</output>" in page
    assert "<blockquote>很好的书</blockquote>" in page
    assert "></textarea>" in page


def test_what_people_type_and_what_the_model_is_called_cannot_become_markup(server):
    _, page = ask(server, "POST", "/", form("<script>alert(1)</script>"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "bad <b>" not in page


def test_the_page_says_what_the_model_does_not_know(server):
    _, page = ask(server, "GET", "/")
    assert "gives one of them to every text" in page
    assert "It knows 11 characters &amp; no more." in page


def test_an_empty_text_gets_a_message_and_no_answer(server):
    response, page = ask(server, "POST", "/", form("  "))
    assert response.status == 200
    assert 'role="alert"' in page
    assert "Answer" not in page


def test_a_body_beyond_the_limit_is_refused(server):
    response, page = ask(server, "POST", "/", form("a" * apply.LIMIT))
    assert response.status == 413
    assert "too long" in page
    assert ask(server, "GET", "/")[0].status == 200


def test_a_form_of_many_fields_and_an_absurd_length_get_a_page_all_the_same(server, capsys):
    assert "Answer" in ask(server, "POST", "/", "a=1&" * 50 + form("很好的书"))[1]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        length = "9" * 5000
        connection.sendall(
            f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        connection.shutdown(socket.SHUT_WR)
        assert b" 413 " in connection.makefile("rb").readline()
    assert capsys.readouterr().err == ""


def test_only_a_browser_that_left_is_passed_over_in_silence(server, capsys):
    for error in (BrokenPipeError("gone"), RuntimeError("a bug")):
        try:
            raise error
        except (BrokenPipeError, RuntimeError):
            server.handle_error(None, ("127.0.0.1", 1))
    said = capsys.readouterr().err
    assert "a bug" in said
    assert "gone" not in said


def test_where_the_model_fails_the_asker_gets_a_page_and_the_terminal_the_traceback(
    server, monkeypatch, capsys
):
    def fails(*_):
        raise RuntimeError("a hole in the model")

    with monkeypatch.context() as broken:
        broken.setattr(server.model, "forward", fails)
        response, page = ask(server, "POST", "/", form("很好"))
        assert response.status == 500
        assert 'role="alert"' in page and "could not answer" in page
        assert "RuntimeError: a hole in the model" in capsys.readouterr().err
        response, text = ask(server, "POST", "/predict", '{"text": "很好"}')
        assert response.status == 500
        assert "could not answer" in json.loads(text)["error"]
        assert "hole" not in page + text
    assert ask(server, "POST", "/", form("很好"))[0].status == 200


def test_the_title_says_first_what_is_new(server):
    for text, news in (("很好的书", "good"), ("", "Type a text first.")):
        assert (
            f"<title>{news} – bad &lt;b&gt; or good?</title>"
            in ask(server, "POST", "/", form(text))[1]
        )
    assert "<title>bad &lt;b&gt; or good?</title>" in ask(server, "GET", "/")[1]


def test_a_port_that_cannot_be_used_ends_with_a_remedy(server, saved, capsys):
    for port in (server.server_port, 70_000):
        assert apply.main(["serve", str(saved), "--port", str(port)]) == 1
        assert f"port {port} cannot be used" in capsys.readouterr().err


def test_a_program_gets_json_and_a_message_for_what_is_no_question(server, saved):
    response, text = ask(server, "POST", "/predict", json.dumps({"text": TEXTS[0]}))
    assert response.getheader("Content-Type") == "application/json; charset=utf-8"
    assert json.loads(text)["label"] == "good"
    wrong = ("{", "[]", "{}", '{"text": 3}', '{"text": " "}', b"\xff", "[" * 60_000)
    for body in (*wrong, '{"text": "\\ud800"}'):  # half a character
        response, text = ask(server, "POST", "/predict", body)
        assert response.status == 400
        assert "text" in json.loads(text)["error"]


def test_there_is_nothing_else_to_be_had(server):
    assert ask(server, "GET", "/model.json")[0].status == 404
    assert ask(server, "GET", "/../model.json")[0].status == 404
    assert ask(server, "POST", "/other", form("好"))[0].status == 404


def test_it_listens_on_this_machine_and_answers_to_no_other_name(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/", Host="evil.example")[0].status == 421
    assert ask(server, "POST", "/predict", '{"text": "好"}', Host="evil.example")[0].status == 421


def test_it_may_not_be_framed_and_loads_nothing(server):
    response, _ = ask(server, "GET", "/")
    policy = response.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy


def test_questions_at_the_same_time_each_get_their_own_answer(server):
    texts, found = TEXTS * 4, {}

    def one(at):
        found[at] = json.loads(ask(server, "POST", "/predict", json.dumps({"text": texts[at]}))[1])

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at]["label"] for at in range(len(texts))] == ["good", "bad <b>"] * 4


def test_ctrl_c_ends_the_server_without_a_traceback(saved):
    command = [sys.executable, "-m", "transferkit.apply", "serve", str(saved), "--port", "0"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heard
    ) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 0
