"""Runs untrusted jinja2 templates with limits on operations, time and output.

jinja's sandbox keeps a template from Python's objects, but not from nested loops or `'x' * 10**10`. Here each
iteration of a loop and each call of a macro checks the time. Each operation that creates a text or a list pays for its
length, in advance if the result can be much longer than the operands.
"""

import datetime
import functools
import inspect
import json
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

SECONDS = 10.0  # limit of CPU time per conversation
LENGTH = 1 << 28  # limit of characters and list items that a template creates per conversation, in total
SOURCE = 1 << 20  # limit of a template's length in characters
_UNBOUNDED = ("center", "wordwrap", "xmlattr", "urlize", "pprint", "sum")  # filters that chat templates do not need
_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map")
_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)")  # field width of 4 digits, or `*`


class TooMuch(jinja2.TemplateError):
    """Error of a template that exceeds a limit of time, output or operations."""


class _Generation(jinja2.ext.Extension):
    """Parses {% generation %} around answers and ignores it: loss weights come from the messages."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Paying(jinja2.visitor.NodeTransformer):
    """Makes the operator `~` pay for the length of its result."""

    def visit_Concat(self, node, *args, **kwargs):
        joined = jinja2.nodes.EnvironmentAttribute("joined")
        return self.generic_visit(jinja2.nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno))


class _Spent(threading.local):
    """Remaining budget of a rendering."""

    until = 0.0  # CPU time of the thread at which the rendering is stopped
    length = 0  # characters and list items left


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Sandbox that enforces the limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        # optimized=False: constant folding at compile time would bypass the limits.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        self.spent = _Spent()
        for name in _UNBOUNDED:
            del self.filters[name]
        self.filters = {name: self._paying(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._paying("tojson", _to_json)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def compiled(self, source: str) -> jinja2.Template:
        """Compiles a template. Raises jinja2.TemplateSyntaxError."""
        if len(source) > SOURCE:
            raise jinja2.TemplateSyntaxError(f"{len(source)} characters exceed the limit of {SOURCE}", 1)
        try:
            tree = _Paying().visit(self.parse(source))
            for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
                check_time = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("look"), [], [], None, None)
                node.body.insert(0, jinja2.nodes.ExprStmt(check_time))
            tree.set_environment(self)
            return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))
        except (RecursionError, MemoryError, OverflowError) as error:
            raise jinja2.TemplateSyntaxError(f"too deeply nested ({type(error).__name__})", 1) from error

    def rendered(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Renders a template. Raises jinja2.TemplateError for any error in it."""
        self.spent.until, self.spent.length = time.thread_time() + SECONDS, LENGTH
        try:
            return self.concat(template.root_render_func(template.new_context(variables)))
        except jinja2.TemplateError:
            raise
        except Exception as error:
            raise jinja2.TemplateError(str(error) or type(error).__name__) from error

    def look(self) -> None:
        """Checks the time limit."""
        if time.thread_time() > self.spent.until:
            raise TooMuch(f"it takes longer than {SECONDS:g} seconds")

    def pay(self, length: int) -> None:
        """Subtracts the length of a text or a list from the budget, and checks both limits."""
        self.spent.length -= length
        if self.spent.length < 0:
            raise TooMuch(f"it creates more than {LENGTH} characters")
        self.look()

    def concat(self, parts: Iterable[str]) -> str:
        """Joins the output of a template, a macro or a block."""
        texts = []
        for part in parts:
            self.pay(len(part))
            texts.append(part)
        return "".join(texts)

    def joined(self, *parts: Any) -> str:
        """Computes the operator `~`."""
        return self.concat(map(str, parts))

    def call_binop(self, context, operator_name: str, left: Any, right: Any) -> Any:
        if operator_name == "*":
            self.pay(max(_length(left) * _number(right), _length(right) * _number(left), 1))
        elif operator_name == "**" and abs(_number(right)) * max(abs(_number(left)), 2).bit_length() > 4096:
            raise TooMuch("it computes a number of more than 4096 bits")
        elif operator_name == "%" and isinstance(left, str):
            if _WIDTH.search(left):
                raise TooMuch("it formats a field of 1000 characters or more")
            self.pay(len(left) + sum(len(str(item)) for item in (right if isinstance(right, tuple) else (right,))))
        elif operator_name == "+":
            self.pay(_length(left) + _length(right))
        return super().call_binop(context, operator_name, left, right)

    def call(self, context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = inspect.unwrap(function) if callable(function) else None  # the sandbox wraps str.format
        name, text = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        if isinstance(text, str):
            if name in _METHODS:
                raise TooMuch(f"it calls str.{name}, which is not allowed")
            self._check(name, text, args)
        result = super().call(context, function, *args, **kwargs)
        self.pay(_length(result))
        return result

    def _check(self, name: str, value: Any, args: tuple) -> None:
        """Pays in advance for filters and methods whose result can be much longer than their text."""
        if name == "replace" and len(args) > 1:
            text, old, new = str(value), str(args[0]), str(args[1])
            self.pay(text.count(old) * len(new))
        elif name == "join" and args and isinstance(value, str) and isinstance(args[0], list | tuple | str):
            self.pay(len(value) * len(args[0]))
        elif name == "indent":
            width = args[0] if args else 4
            self.pay((str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else _number(width)))

    def _paying(self, name: str, function: Any) -> Any:
        """Wraps a filter so that it pays for its result."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def filtered(*args, **kwargs):
            value, rest = args[first], (*args[first + 1 :], *kwargs.values())
            if name == "join" and rest:
                value = value if isinstance(value, str | list | tuple) else list(value)
                self.pay(len(value) * len(str(rest[0])))
                args = (*args[:first], value, *args[first + 1 :])
            self._check(name, value, rest)
            result = function(*args, **kwargs)
            self.pay(_length(result))
            return result

        return filtered


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if isinstance(indent, int) and indent > 16 or isinstance(indent, str) and len(indent) > 16:
        raise TooMuch(f"tojson(indent={indent!r:.40}) indents by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = _Environment()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.compiled(source)


def check(source: str) -> None:
    """Raises jinja2.TemplateSyntaxError if a template does not compile."""
    _compiled(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """Renders a template with variables. Raises jinja2.TemplateError, or TooMuch if it exceeds a limit."""
    return _ENVIRONMENT.rendered(_compiled(source), variables)
