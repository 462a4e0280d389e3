"""Chat templates as transformers renders them, and hostile ones, which are stopped."""

import resource
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from arabic_qwen.data import rendering
from arabic_qwen.data.rendering import LIMIT, LONGEST_TEMPLATE, render
from arabic_qwen.data.templates import ALPACA, CHATML, render_prompt
from arabic_qwen.errors import HostileTemplateError

MESSAGES = [
    {"role": "system", "content": "أجب بإيجاز."},
    {"role": "user", "content": "ما عاصمة الأردن؟"},
    {"role": "assistant", "content": "<think>\nسؤال سهل\n</think>\n\nعمّان."},
    {"role": "user", "content": " شكرًا\n"},
]

#: What prompt formats of published models use.
QWEN3_LIKE = """
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reason = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + reason.strip('\\n') + content }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not (enable_thinking is defined and enable_thinking is false) %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""

ORDINARY = {
    "alpaca": ALPACA.replace("RESPONSE", "'### Response:\\n'"),
    "chatml": CHATML,
    "qwen3": QWEN3_LIKE,
    "generation": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}",
    "macro": (
        "{% macro turn(m, end='') %}[{{ m.role|upper ~ ': ' ~ m['content']|trim ~ end }}]{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ turn(m, end=eos_token) }}{% endfor %}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages[1:] | tojson(indent=2) }}{{ ' a b '.strip() }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'x' * 3 }}{{ 7 % 4 + 2 ** 5 }}"
        "{{ ['a', 'b'] | join('-') | replace('a', 'c') | indent(2, true) }}{{ '-'.join(['a', 'b']).replace('b', 'd') }}"
    ),
    "loops": (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.previtem.role if loop.previtem }}"
        "{{ loop.cycle('a', 'b') }}{% if loop.last %}!{% endif %}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "nothing": "{% for x in absent %}{{ x }}{% else %}-{% endfor %}{{ absent }}{{ dict(a=1)['a'] }}{{ none }}",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "set": "{% set both %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ both|title }}",
    "spaces": "{% for m in messages %}\n  {{ m.role }}\n{% if loop.first %}\n  first\n{% endif %}\n{% endfor %}\n",
    "whitespace only": " \n",
}


@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_ordinary_templates_render_as_transformers_renders_them(tokenizer, template, add_generation_prompt):
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    ours = render(
        template,
        messages=MESSAGES,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    assert ours == expected


@settings(max_examples=30)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_comes_out_as_it_is(texts):
    messages = [{"role": "user", "content": text} for text in texts]
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", messages=messages) == "".join(texts)


def test_long_conversations_are_no_bombs():
    messages = [{"role": "user", "content": "كلمة " * 100_000}] * 60
    assert len(render(QWEN3_LIKE, messages=messages)) > 30_000_000


ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "dict": "{{ dict.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "format": "{{ '{0.__class__.__init__.__globals__[os]}'.format(namespace) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': namespace}) }}",
    "getattr by filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "include": "{% include '/etc/passwd' %}",
    "joiner": "{{ joiner.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "letters": "{{ ('ا' * 9999999) | list | length }}",
    "letters by name": "{{ ['ا' * 9999999] | map('list') | map('length') | first }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|map(attribute='__mro__')|list|first|last }}!{{ 1/0 }}",
    "namespace": "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "namespace attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "own internals": "{{ self.__init__.__globals__ }}",
    "request": "{{ self._TemplateReference__context.environment.globals }}{{ 1/0 }}",
    "strftime": "{{ strftime_now.__globals__.datetime.sys.modules['os'].system('touch MARKER') }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_no_template_leaves_the_sandbox(template, tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(Exception) as error:
        render(template.replace("MARKER", str(marker)), messages=MESSAGES)
    assert not marker.exists()
    assert "root:" not in str(error.value)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
END = "{% endfor %}{% endfor %}{% endfor %}"
DOUBLE = "{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {next} %}}{{% endfor %}}{{{{ ns.x }}}}"
BOMBS = {
    "a long range": "{% for i in range(10**9) %}a{% endfor %}",
    "all the digits": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "appended": DOUBLE.format(start="'a'", next="ns.x ~ ns.x"),
    "bytes of a number": "{{ (1).to_bytes(10**10, 'big') }}",
    "calls": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
    "centred": "{{ 'a'.center(10**9) }}",
    "comparisons": DOUBLE.format(start="'a'", next="[ns.x, ns.x]") + "{{ ns.x == ns.x }}",
    "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "divided": LOOP + "{{ 'a'.split('b') == 'a'.split('b') }}" + END,
    "doubled lists": DOUBLE.format(start="['a']", next="ns.x + ns.x"),
    "elif": "{% if a %}" + "{% elif a %}" * 20_000 + "{% endif %}",
    "factors": "{{ 'a' * 10**9 }}",
    "filter center": "{{ 'a'|center(10**9) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "formatted": "{{ '%1000000000d' % 1 }}",
    "hexadecimal": "{{ 0x" + "f" * 200_000 + " > 1 }}",
    "hexadecimal by filter": "{% set x = ('f' * 5000000) | int(0, 16) %}{{ x > 1 }}",
    "hexadecimal in a list": "{{ ['f' * 5000000] | map('int', 0, 16) | first > 1 }}",
    "indented": "{{ 'a'|indent(10**9, true) }}",
    "indented lines": "{{ 'a\\n' | replace('\\n', '\\n' * 99999) | indent(99999, blank=true) }}",
    "joined": "{{ range(99999) | join('a' * 999999) }}",
    "joined by method": "{{ ('a' * 999999).join(['a'] * 99999) }}",
    "just work": LOOP + "{% if i == j == k == 1 %}{% endif %}" + END,
    "lipsum": "{{ lipsum(n=10**6) }}",
    "lists in lists": DOUBLE.format(start="'a'", next="[ns.x, ns.x]"),
    "mappings": DOUBLE.format(start="'a'", next="{'a': ns.x, 'b': ns.x}"),
    "many tuples": DOUBLE.format(start="'a'", next="(ns.x, ns.x)"),
    "namespaces": DOUBLE.format(start="'a'", next="namespace(a=ns.x, b=ns.x)") + "{{ 1/0 }}",
    "nested loops": LOOP + "a" + END,
    "output": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "padded": "{{ 'a'.ljust(10**9) }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "replaced by filter": "{{ ('a' * 99999) | replace('', 'a' * 99999) }}",
    "rounded": "{{ 3 | round(10**9, 'ceil') }}",
    "searches": "{% set x = 'a' * 9999999 %}" + LOOP + "{% if 'b' in x %}{% endif %}" + END,
    "set block": "{% set x %}" + LOOP + "aaaaaaaaaa" + END + "{% endset %}",
    "slices": "{% set x = 'a' * 9999999 %}{% set ns = namespace(y=[]) %}"
    "{% for i in range(999) %}{% set ns.y = ns.y + [x[i:]] %}{% endfor %}",
    "split": "{{ ('اب,' * 3000000).split(',') | length }}",
    "split at spaces": "{{ ('اب ' * 3000000).split() | length }}",
    "split into lines": "{{ ('اب\n' * 3000000).splitlines() | length }}",
    "spread": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f('a') }}",
    "strings of lists": DOUBLE.format(start="['a']", next="[ns.x, ns.x] | string"),
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}",
    "too long": " " * (LONGEST_TEMPLATE + 1),
    "variables": "{% set a = 'a' * 9999999 %}" + "".join(f"{{% set a{i} = a ~ {i} %}}" for i in range(999)),
    "words": "{{ ('a ' * 5000000) | wordcount }}",
    "wordwrap": "{{ ('a' * 99999) | wordwrap(1, wrapstring='a' * 99999) }}",
    "zeros": "{{ '1'.zfill(10**9) }}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_bombs_are_stopped(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((HostileTemplateError, TemplateError, TypeError, ZeroDivisionError)):
        render(template, messages=MESSAGES)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 500_000, f"{more} KiB more"


def test_bombs_are_stopped_in_every_thread():
    found = []

    def run():
        try:
            render(BOMBS["nested loops"], messages=MESSAGES)
        except HostileTemplateError as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2


def test_time_is_limited(monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 10**12)
    monkeypatch.setattr(rendering, "SECONDS", 0.01)
    with pytest.raises(HostileTemplateError, match=r"runs for more than 0\.01 seconds"):
        render(BOMBS["just work"], messages=MESSAGES)


def test_the_error_says_what_is_wrong(tokenizer):
    tokenizer.chat_template = BOMBS["factors"]
    with pytest.raises(HostileTemplateError) as error:
        render_prompt(tokenizer, MESSAGES)
    assert str(error.value) == (
        f"the chat template does what no prompt format needs (it makes more than {LIMIT:,} characters and 32 times the "
        "messages'); use another one, such as chatml"
    )


def test_nothing_else_renders_templates():
    """Everything that renders goes through the limits."""
    package = Path(rendering.__file__).parents[1]
    others = [path.name for path in package.rglob("*.py") if "apply_chat_template(" in path.read_text(encoding="utf-8")]
    assert not others
