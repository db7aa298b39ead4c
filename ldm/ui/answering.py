"""What nobody's page asks for is answered in one line, and logged in one without the values that were sent.

Gradio answers such requests with a bare "Error", and prints a traceback with all of their values.
"""

import logging
import uuid
from html import escape
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.state_holder import SessionState
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.cli import printable
from ldm.errors import LdmError
from ldm.ui import bugs

log = logging.getLogger("ldm.ui")


def refusal(words: object) -> gr.Error:
    """The error that a client gets as these words: the line that the command line prints."""
    return gr.Error(str(words), title="Not done", print_exception=False)


def owner(request: gr.Request) -> str:
    """The name of the open page or of the client that asks; one that gives no name shares nothing with others."""
    return request.session_hash or uuid.uuid4().hex


class Blocks(gr.Blocks):
    """Gradio's blocks, which say what is wrong with a request; a bug of a handler is logged under a number."""

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, explicit_call: bool = False
    ) -> list[Any]:
        """The values of a request as its handler gets them. Raises gr.Error for others than it takes."""
        name, count = block_fn.api_name or block_fn.name, len(block_fn.inputs)
        wrong = f"{name}: {len(inputs)} values were sent where it takes {count}" if len(inputs) != count else ""
        if wrong or not block_fn.fn:
            wrong = wrong or "page: this is done in the browser"
            log.warning("refused: %s", wrong)
            raise refusal(f"{wrong}; reload the page, or see its API")
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except Exception as error:  # each component has errors of its own
            log.warning("refused: %s: a value of a kind that it does not take", name)
            words = printable(error.message) if isinstance(error, gr.Error) else "a value is not of the kind it takes"
            raise refusal(f"{name}: {escape(words)}; reload the page, or see its API") from None

    async def call_function(self, block_fn: BlockFunction | int, *given: Any) -> dict[str, Any]:
        """What a handler returns. Raises gr.Error in our words where it cannot."""
        try:
            return await super().call_function(block_fn, *given)
        except gr.Error:
            raise
        except LdmError as error:
            raise refusal(escape(str(error))) from None
        except Exception:
            raise refusal(bugs.told()) from None


class OneLine:
    """Ends requests that Gradio's own routes fail on, such as one for a function or a stream that does not exist.

    With the log level DEBUG the traceback is logged, too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; answer 400 where that fails before anything was answered."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:  # whatever a route makes of a request that it did not expect
            what = printable(f"{scope.get('method', '')} {scope['path']}", 100)
            log.warning("refused: %s: %s", what, type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
            if begun:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await Response("request: this server has no such thing; reload the page", 400)(scope, receive, send)
