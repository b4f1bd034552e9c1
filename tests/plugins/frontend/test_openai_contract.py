"""The rules of the API, over the fake engine."""

from support.openai_contract import OpenAIContract


class TestOverTheFakeEngine(OpenAIContract):
    """Every rule of the contract."""
