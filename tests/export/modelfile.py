"""Reads a Modelfile by Ollama's grammar: parser/parser.go of Ollama, its states followed one character at a time."""

from __future__ import annotations

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
}
SPACE, NEWLINE = " \t", "\r\n"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) in order; a parameter's command is its name. Raises ValueError where Ollama refuses the file."""
    commands: list[tuple[str, str]] = []
    state, name, buffer = "nothing", "", ""
    for character in text + "\n":
        if state in ("nothing", "comment"):
            if state == "comment":
                state = "nothing" if character in NEWLINE else "comment"
            elif character == "#":
                state = "comment"
            elif character not in SPACE + NEWLINE:
                state, buffer = "name", character
        elif state == "name" and character in SPACE:
            if buffer.lower() not in COMMANDS:
                raise ValueError(f"{buffer!r} is no command")
            state, name, buffer = ("parameter" if buffer.lower() == "parameter" else "value"), buffer.lower(), ""
        elif state == "parameter" and character in SPACE:
            state, name, buffer = "value", buffer, ""
        elif state == "value" and character in SPACE + NEWLINE:
            value = unquoted(buffer.strip())
            if value is None or character in SPACE:
                buffer += character
            else:
                commands.append((name, value))
                state, buffer = "nothing", ""
        elif state == "value":
            buffer += character if character.isprintable() else ""
        elif not (
            character.isascii() and (character.isalpha() or (state == "parameter" and character in "0123456789_"))
        ):
            raise ValueError(f"{character!r} in the name {buffer!r}")
        else:
            buffer += character
    if state != "nothing" or not any(command == "from" for command, _ in commands):
        raise ValueError("a value that does not end" if state != "nothing" else "no FROM")
    return commands


def unquoted(value: str) -> str | None:
    """The value without its quotes; None if they do not end."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            whole = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if whole else None
    return value
