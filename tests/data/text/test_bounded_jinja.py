"""Chat templates of strangers: what they may compute is bounded, and those that models have compute as in jinja."""

import time

import jinja2.sandbox
import pytest
from chat_templates import STYLES, chat_format

from mllm_jax.data.text import bounded_jinja
from mllm_jax.data.text.chat_template import ChatTemplate

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = BODY %}{% endfor %}"
HOSTILE = {
    "loop": LOOP,
    "loop without a body": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(90) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "times": "{{ 'x' * 10 ** 10 }}",
    "list times": "{{ ([0] * 10 ** 10) | length }}",
    "times reversed": "{{ 10 ** 10 * 'x' }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "plus": DOUBLING.replace("BODY", "n.s + n.s"),
    "tilde": DOUBLING.replace("BODY", "n.s ~ n.s"),
    "join": DOUBLING.replace("BODY", "[n.s, n.s] | join"),
    "method join": DOUBLING.replace("BODY", "n.s.join([n.s, n.s, n.s])"),
    "replace": DOUBLING.replace("BODY", "n.s | replace('x', 'xx')"),
    "method replace": DOUBLING.replace("BODY", "n.s.replace('x', 'xx')"),
    "block": DOUBLING.replace("{% set n.s = BODY %}", "{% set t %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = t %}"),
    "kept": "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + ['x' * 999999] %}{% endfor %}",
    "format": "{{ '%9999999999d' % 1 }}",
    "star": "{{ '%*d' % (9999999999, 1) }}",
    "method format": "{{ '{:9999999999}'.format(1) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999999) }}",
    "filter center": "{{ 'x' | center(9999999999) }}",
    "indent": "{{ ('\n' * 99999) | indent(99999999) }}",
    "tojson": "{{ [[[1]]] | tojson(indent=999999999) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "nested": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "long": "x" * (bounded_jinja.SOURCE + 1),
    "division": "{{ 1 / 0 }}",
    "index": "{{ messages[5].content.foo.bar }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_error(name, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "SECONDS", 0.3)
    monkeypatch.setattr(bounded_jinja, "LENGTH", 1 << 22)
    start = time.thread_time()
    with pytest.raises(ValueError, match="does not accept this conversation") as raised:
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert time.thread_time() - start < 2 and len(str(raised.value)) < 300


def test_a_hostile_template_is_tried_once(monkeypatch):
    monkeypatch.setattr(bounded_jinja, "SECONDS", 0.3)
    start = time.thread_time()
    with pytest.raises(ValueError, match="takes longer than 0.3 seconds"):
        chat_format(LOOP)
    assert time.thread_time() - start < 2


def test_a_template_of_many_records_is_counted_anew(monkeypatch):
    monkeypatch.setattr(bounded_jinja, "LENGTH", 5000)
    template = ChatTemplate("{% for m in messages %}{{ m.content + 'x' }}{% endfor %}")
    for _ in range(20):
        assert len(template.render([{"role": "user", "content": "x" * 999}])) == 1000


@pytest.mark.parametrize("name", STYLES)
def test_templates_of_models_write_what_jinja_writes(name):
    source = STYLES[name][0]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"role": role, "content": f" {role} <|im_end|>\n"} for role in ("user", "assistant", "user", "assistant")
    ]
    for generate in (False, True):
        values = {"add_generation_prompt": generate, "bos_token": "<s>", "eos_token": "</s>", "tools": None}
        expected = environment.from_string(source).render(messages=messages, **values)
        assert ChatTemplate(source).render(messages, generate, bos_token="<s>", eos_token="</s>") == expected


def test_what_joins_texts_is_jinjas():
    source = "{{ 1 ~ 'a' ~ none ~ [2] }}|{{ ['a', 'b'] | map('upper') | join('-') }}|{{ 'a,b'.split(',') | join }}"
    source += "|{{ 'ab'.replace('a', 'cc') }}|{{ '%s: %d' % ('x', 3) }}|{{ {'b': 1} | tojson(indent=2) }}|{{ 2 ** 10 }}"
    assert ChatTemplate(source).render([]) == '1aNone[2]|A-B|ab|ccb|x: 3|{\n  "b": 1\n}|1024'
