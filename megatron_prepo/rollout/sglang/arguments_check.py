"""`python -c "$(cat arguments_check.py)" SETTINGS WORDS`: whether SGLang accepts section `sglang`.

Run by the servers' interpreter, which has SGLang and may lack this package.  SGLang's own parser
reads the command line (WORDS, in JSON) of a server; SETTINGS are the user's, by name.  The last
line of the output is an error message, in JSON, or null.
"""

import argparse
import json
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Parser that raises errors and rejects abbreviations."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of exiting."""
        raise ValueError(message)


def mistake(settings: dict[str, Any], words: list[str]) -> str | None:
    """Return an error message for what SGLang would reject or misunderstand; else None."""
    from sglang.srt.server_args import ServerArgs

    parser = Parser()
    ServerArgs.add_cli_args(parser)
    options = {option: action for action in parser._actions for option in action.option_strings}
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if option not in options:
            return f"sglang.{name}: SGLang has no option {option}"
        flag = options[option].nargs == 0
        if isinstance(value, bool) and options[option].nargs not in (0, "?"):
            return f"sglang.{name}={json.dumps(value)}: SGLang's {option} takes a value"
        if value is False and f"--no-{option[2:]}" in options:
            return f"sglang.{name}=false: write sglang.no_{name.replace('-', '_')}=true"
        if flag and not isinstance(value, bool | None):
            return f"sglang.{name}={json.dumps(value)}: SGLang's {option} is true or false"
    try:
        parser.parse_args(words)
    except (ValueError, argparse.ArgumentError) as error:
        return f"SGLang refuses the settings of sglang: {error}"
    return None


if __name__ == "__main__":
    found = mistake(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
    print("\n" + json.dumps(found))
