"""The one error type a user sees."""


class MixfuseError(Exception):
    """Something the user can mend: bad input, a missing file, a port in use, an adapter of another base.

    The message is one line that names what is wrong and how to mend it. The command line prints it and exits with
    code 2; the gateway answers with a typed 4xx or 5xx.

    Attributes:
        kind: A short stable name of the failure (`invalid_request`, `adapter`, `engine`, …), used as the HTTP error
            `type`.
    """

    def __init__(self, message: str, *, kind: str = "invalid_request") -> None:
        super().__init__(" ".join(message.split()))
        self.kind = kind
