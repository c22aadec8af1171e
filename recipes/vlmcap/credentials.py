"""Tokens come from the environment (HF_TOKEN) or the Hub login, never from an argument, a file of settings or a name:
arguments end in shell histories, process lists, logs, checkpoints and cards."""

import re
from dataclasses import fields

from vlmcap.errors import UserError

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
_USER_INFO = re.compile(r"(?<=:/)(/?)[^/\s@]+@")  # one slash: what a path of an address becomes
_SIGNED = re.compile(
    r"(?i)(?<=[?&])((?:x-amz-[a-z-]+|signature|[a-z_]*token|[a-z_]*key|policy|key-pair-id)=)[^&\s'\")]+"
)


class CredentialError(UserError):
    """A setting holds a token or a password. The message names the setting, never what it holds."""


def redact(text: str) -> str:
    """The text without Hub tokens, without user and password of an address, without the signature of a signed one."""
    return _SIGNED.sub(r"\1REDACTED", _USER_INFO.sub(r"\1REDACTED@", _TOKEN.sub("REDACTED", text)))


def refuse_credentials(*arguments) -> None:
    """Raises CredentialError if a field of the dataclasses holds a token, or an address with user or password."""
    for group in arguments:
        for name in (field.name for field in fields(group)):
            value = getattr(group, name)
            if name in ("hub_token", "push_to_hub_token") and value:
                raise CredentialError(
                    f"--{name}: a token is not accepted as an argument, where logs and checkpoints would keep it. Log"
                    " in with `hf auth login`, or set HF_TOKEN in the environment."
                )
            if redact(str(value)) != str(value):
                raise CredentialError(
                    f"--{name} holds a token, or an address with a user or a password (https://user:password@...), and"
                    " settings are printed and published. Leave it out: log in with `hf auth login`, or set HF_TOKEN."
                )
