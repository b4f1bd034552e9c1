"""The ``openai`` frontend: an HTTP server that speaks the OpenAI API, with a chat page.

frontend.py     the plugin: reserve a socket, serve, drain, stop
config.py       its settings
app.py          the application: routes, middleware, error handlers
guard.py        the door: request ids and API keys
body.py         from the bytes of a body to a checked request
schemas.py      what a request may say, and what is refused by name
generation.py   from a checked request to streams of the engine, and what to do when the client leaves
chat.py         /v1/chat/completions
completions.py  /v1/completions
operations.py   models, tokenize, health, metrics, selection
pages.py        the chat page, /docs and the OpenAPI document
errors.py       the API's error format
"""

from drivetrain.plugins.frontend.openai.config import OpenAIConfig
from drivetrain.plugins.frontend.openai.frontend import OpenAIFrontend

__all__ = ["OpenAIConfig", "OpenAIFrontend"]
