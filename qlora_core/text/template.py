"""Chat templates: messages in, text out, as `transformers`' ``apply_chat_template`` renders them.

A template is a program that came with a model, so it runs in jinja's immutable sandbox and sees plain
JSON values only. The date it may print is taken once, when it is loaded, so that every example of a run
(and every prefix the loss mask is made from) shows the same one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from qlora_core.errors import EngineError

Message = dict[str, Any]

# Where a message may carry its reasoning; templates read the first (gpt-oss reads `thinking`).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# What a template's own code can raise on messages it was not written for.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateError(EngineError):
    """The chat template does not parse, or refused the messages; the message quotes its reason."""

    code = "chat_template_error"


class ChatTemplate:
    """One compiled chat template.

    Args:
        source: the jinja text.
        variables: what the template sees beside the messages: ``bos_token``, ``eos_token``, …
        now: the time that the template may print, in seconds since the epoch; the present one if not given.

    Raises:
        TemplateError: ``source`` is not valid jinja.
    """

    def __init__(
        self, source: str, variables: Mapping[str, str], *, now: float | None = None
    ) -> None:
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = _environment(time.localtime(now)).from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"The chat template is not valid jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the conversation as text.

        Raises:
            TemplateError: the template raised, by intent (``raise_exception``) or by accident.
        """
        try:
            return self._template.render(
                messages=[_prepared(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _RENDER_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise TemplateError(f"The chat template refuses it: {reason}") from error


def _prepared(message: Mapping[str, Any]) -> Message:
    """Leave out null fields (templates print ``None``) and give reasoning under every name in use."""
    prepared = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared.setdefault("thinking", reasoning)
        prepared["reasoning_content"] = reasoning
    return prepared


def _environment(now: time.struct_time) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Build the environment chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_clock(now),
        dict=_new_dict,
        namespace=_Namespace,
    )
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """Accept ``{% generation %}…{% endgeneration %}`` and render what is inside.

    `transformers` marks assistant text with it; our mask comes from prefixes and needs no mark.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: it gives the body a scope of its own.
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """The ``namespace`` of jinja, without names that begin with an underscore."""

    def __init__(self, /, *args: object, **kwargs: object) -> None:
        for name in dict(*args, **kwargs):  # type: ignore[arg-type]
            _check_public(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot set the private name {name!r}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401 - what a template gives
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _clock(now: time.struct_time) -> Callable[[str], str]:
    return lambda form: time.strftime(form, now)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja's ``tojson``, which escapes HTML and sorts keys: models were trained on plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
