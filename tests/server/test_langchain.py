"""LangChain's own model of an OpenAI chat, pointed at the running server."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

from server.running import NAME, PROMPT, Running


@pytest.fixture
def chat(running: Running) -> ChatOpenAI:
    return ChatOpenAI(model=NAME, base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=12)


def test_a_message_and_a_stream_are_what_the_server_says(chat: ChatOpenAI, client: OpenAI) -> None:
    expected = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": PROMPT}], temperature=0, max_tokens=12
    )
    answer = chat.invoke([HumanMessage(PROMPT)])
    assert isinstance(answer, AIMessage)
    assert answer.content == expected.choices[0].message.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    pieces = list(chat.stream([HumanMessage(PROMPT)]))
    assert "".join(str(piece.content) for piece in pieces) == answer.content
    assert len(pieces) > 4


def test_a_chain_with_a_prompt_and_a_batch(chat: ChatOpenAI) -> None:
    chain = ChatPromptTemplate([("system", "Answer in {language}."), ("user", "{text}")]) | chat | StrOutputParser()
    asked = [{"language": language, "text": PROMPT} for language in ("French", "German")]
    answers = chain.batch(asked)
    alone = chat.invoke([SystemMessage("Answer in French."), HumanMessage(PROMPT)])
    assert answers[0] == alone.content
    assert len(answers) == 2
