"""Chat templates take content as text or as parts; the user's words reach the model in either form."""

import json

import pytest

from tests.tiny import write_tokenizer
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import RequestError
from ulysses_infer.text.chat_template import ChatTemplate
from ulysses_infer.text.prompts import load_tokenizer

PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
END = "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
OF_PARTS = "{% for m in messages %}[{{ m.role }}]" + PARTS + END
OF_TEXT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + END
OF_TRIMMED_TEXT = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}" + END
OF_BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}" + END
)
BY_ROLE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}"
    + PARTS
    + "{% else %}{{ m.content }}{% endif %}"
    + END
)
ORDERED = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
ALTERNATING = "{% for m in messages %}" + ORDERED + "[{{ m.role }}]" + PARTS + END


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(ModelConfig(path=str(folder)), folder)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "of_text", "of_parts"),
    [
        (OF_TEXT, "[user]hi[a]", "[user]hi\nyou[a]"),
        (OF_TRIMMED_TEXT, "[user]hi[a]", "[user]hi\nyou[a]"),
        (OF_PARTS, "[user]hi[a]", "[user]hiyou[a]"),
        (OF_BOTH, "[user]hi[a]", "[user]<hi><you>[a]"),
        (ALTERNATING, "[user]hi[a]", "[user]hiyou[a]"),
    ],
)
def test_content_is_given_in_the_form_that_the_template_reads(tokenizer, template, of_text, of_parts):
    tokenizer.chat_template = template
    found = ChatTemplate(tokenizer)
    assert found.render([{"role": "user", "content": "hi"}]) == of_text
    assert found.render([{"role": "user", "content": parts("hi", "you")}]) == of_parts


def test_each_role_has_its_own_form(tokenizer):
    tokenizer.chat_template = BY_ROLE
    messages = [{"role": "system", "content": parts("be", "kind")}, {"role": "user", "content": "hi"}]
    assert ChatTemplate(tokenizer).render(messages) == "[system]be\nkind[user]hi[a]"


def test_a_role_that_may_only_answer_is_tried_as_an_answer(tokenizer):
    tokenizer.chat_template = ALTERNATING
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert ChatTemplate(tokenizer).render(messages, add_generation_prompt=False) == "[user]hi[assistant]yes"


def test_what_transformers_renders_from_parts_is_what_is_rendered_here(tokenizer):
    for template in (OF_PARTS, OF_BOTH):
        tokenizer.chat_template = template
        messages = [{"role": "user", "content": parts("hi", "you")}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ChatTemplate(tokenizer).render(messages) == expected


FIRST = "{{ messages[0].role == 'system' or raise_exception('system first') }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (FIRST + OF_PARTS, "True[system]bekind[user]hi[a]"),  # only accepts conversations with a system message
        (FIRST + OF_PARTS.replace("m.content", "m.content[:1]"), "True[system]be\nkind[user]hi[a]"),
        (OF_TEXT.replace("m.content", "m.content | tojson(separators=(',', ':'))"), '[system]"be\\nkind"[user]"hi"[a]'),
    ],
)
def test_nothing_that_the_user_wrote_is_lost(tokenizer, template, expected):
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": parts("be", "kind")}, {"role": "user", "content": "hi"}]
    assert ChatTemplate(tokenizer).render(messages) == expected


CALL = {"function": {"name": "get", "arguments": '{"city": "Rome"}'}}
OF_CALLS = "{{ m.role }}:{% for call in m.tool_calls or () %}{{ call.function.arguments | tojson }}{% endfor %}"
OF_CALLS_IN_TEXT = (  # as DeepSeek's
    "{{ m.role }}:{% if m['content'] is none %}{% for call in m.tool_calls %}{{ '<' + call.function.arguments + '>' }}"
    "{% endfor %}{% else %}{{ m['content'] + '|' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OF_CALLS, 'user:assistant:{"city": "Rome"}'),
        (OF_CALLS_IN_TEXT, 'user:hi|assistant:<{"city": "Rome"}>'),
        (OF_CALLS + "{{ '=' + m.content[0].text }}", 'user:=hiassistant:{"city": "Rome"}='),
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_calls_without_content_are_rendered(tokenizer, template, expected, content):
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", **content, "tool_calls": [CALL]}]
    assert ChatTemplate(tokenizer).render(messages) == expected


def test_absent_content_is_empty(tokenizer):
    for template in (OF_TEXT, OF_PARTS):
        tokenizer.chat_template = template
        assert ChatTemplate(tokenizer).render([{"role": "user", "content": None}]) == "[user][a]"


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": "x"}], [3], 7])
def test_content_without_text_is_refused_by_its_type(tokenizer, content):
    tokenizer.chat_template = OF_PARTS
    with pytest.raises(RequestError, match=r"image_url|int"):
        ChatTemplate(tokenizer).render([{"role": "user", "content": content}])


def test_any_error_of_a_template_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(RequestError, match="the chat template refuses these messages: division by zero"):
        ChatTemplate(tokenizer).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_in_a_processors_file_is_found(tmp_path, name):
    write_tokenizer(tmp_path)
    for found in (tmp_path / "chat_template.jinja",):
        found.unlink()
    (tmp_path / name).write_text(json.dumps({"chat_template": OF_PARTS}))
    assert load_tokenizer(ModelConfig(path=str(tmp_path)), tmp_path).chat_template == OF_PARTS
