"""`python -c "$(cat arguments_check.py)" SETTINGS WORDS`: whether SGLang takes what `sglang:` sets.

Run by the servers' interpreter, which has SGLang and need not have us.  SGLang's own parser reads
the command line (WORDS, in JSON) that a server would get; SETTINGS are the user's, by name.  The
last line of the output is what is wrong, in JSON, or null.
"""

import argparse
import json
import sys


class Parser(argparse.ArgumentParser):
    """Raises what is wrong, and takes no abbreviations."""

    def __init__(self):
        super().__init__(allow_abbrev=False)

    def error(self, message: str) -> None:
        """ValueError instead of the end of the process."""
        raise ValueError(message)


def mistake(settings: dict, words: list[str]) -> str | None:
    """What SGLang would not take, or take for something else; None if nothing."""
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
