"""Changes the heads of all requests of a stream, and nothing else. No I/O.

`requests` has the rules by which requests are followed. The differences for a stream to one local server:

    1. Every head is replaced by what `HeaderRules` makes of it, the first one included. Any host may be named.
    2. A head with an Upgrade uses the same stream. The bytes after it are held until its response is known.
    3. A head that `allows` does not let pass needs a stream of its own (`next_request`).
    4. No head passes after a response whose end is not known, or which ends with the stream: a part of that response
       could look like a 101.

So no request reaches the server as the visitor wrote it. What cannot be followed is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from .bodies import BodyReader, Data
from .forwarded import HeaderRules
from .head import RequestHead
from .requests import RequestReader
from .responses import ResponseFollower

__all__ = ["RequestRewriter"]


def _always(head: RequestHead) -> bool:  # noqa: ARG001  # the default
    return True


@final
class RequestRewriter(RequestReader):
    """Follows the requests of one stream to a local server, and changes their heads. See the module.

    Args:
        rules: the changes.
        responses: follows the server's responses.
        allows: whether a request may pass. It is asked once for each.
    """

    __slots__ = ("_allows", "_rules")

    def __init__(
        self, rules: HeaderRules, responses: ResponseFollower, allows: Callable[[RequestHead], bool] = _always
    ) -> None:
        super().__init__(responses, BodyReader(rules.replaces))
        self._rules: Final = rules
        self._allows: Final = allows

    def _take_head(self, head: RequestHead, received: bytes, data: Data, start: int, end: int) -> bool:
        if self._responses.is_last:
            self.stop()
            return False
        if not self._allows(head):
            self._demand_stream(head, received, data, start, end)
            return False
        head, changed = self._rules.apply(head, received)
        self._forward(data, start)
        self._pieces.append(changed)
        self._forwarded = end
        self._begin_body(head)
        return True
