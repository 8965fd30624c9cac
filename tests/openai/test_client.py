"""What a program written against OpenAI's Python client sees of the server.

    python test_client.py path/to/paceline

Every function named test_* is a test; it gets a client of a server with the bundled model.
"""

import sys
import time
import traceback

import openai
from serving import Serving

COUNT = [{"role": "user", "content": "Count from 3 in steps of 4, 12 numbers."}]
STORY = [{"role": "user", "content": "Write a story about a lost kite."}]
# An answer that the model ends by itself.
CODE = [{"role": "user", "content": "Write a Python function add."}]
PROMPT = "Once upon a time, there was a little girl named Lily."
KEY = "a key of ours"


def chat(client, messages=COUNT, **more):
    fields = {"model": "", "messages": messages, "max_tokens": 48, "temperature": 0, "seed": 1, **more}
    return client.chat.completions.create(**fields)


def complete(client, prompt=PROMPT, **more):
    fields = {"model": "", "prompt": prompt, "max_tokens": 32, "temperature": 0, "seed": 1, **more}
    return client.completions.create(**fields)


def refused(kind, status, call):
    """The error that `call` earns, and the object in its body."""
    try:
        call()
    except kind as error:
        assert type(error) is kind, type(error)
        assert error.status_code == status, error.status_code
        assert error.body["code"] == status, error.body
        return error, error.body
    raise AssertionError(f"no {kind.__name__}")


def test_models(client):
    models = client.models.list().data
    assert len(models) == 1 and models[0].object == "model" and models[0].created > 0, models
    assert chat(client, model=models[0].id, max_tokens=2).model == models[0].id
    assert chat(client, model="", max_tokens=2).model == models[0].id


def test_chat(client):
    reply = chat(client)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-"), reply
    assert reply.system_fingerprint.startswith("paceline-"), reply
    assert abs(reply.created - time.time()) < 60
    (choice,) = reply.choices
    assert choice.index == 0 and choice.finish_reason in ("stop", "length"), choice
    assert choice.message.role == "assistant" and len(choice.message.content) > 10, choice
    usage = reply.usage
    assert usage.prompt_tokens > 10 and 0 < usage.completion_tokens <= 48, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert usage.prompt_tokens_details.cached_tokens >= 0, usage


def test_chat_with_parts_and_roles(client):
    parts = [{"type": "text", "text": COUNT[0]["content"]}]
    assert chat(client, [{"role": "user", "content": parts}]).choices == chat(client).choices
    talk = [
        {"role": "developer", "content": "You count."},
        *COUNT,
        {"role": "assistant", "content": "3, 7, 11"},
        {"role": "user", "content": "Go on."},
    ]
    assert chat(client, talk).choices[0].message.content


def counts(usage):
    """What is counted whoever asked the same before: how much of a prompt came from the cache is not."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_speculation_is_reported(client):
    timings = chat(client).timings
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"], timings
    assert timings["predicted_n"] > 0 and timings["predicted_ms"] > 0 and timings["prompt_ms"] > 0, timings
    plain = chat(client, extra_body={"speculative.n_max": 0})
    assert "draft_n" not in plain.timings and "draft_n_accepted" not in plain.timings, plain.timings
    assert plain.choices == chat(client).choices


def test_stream(client):
    for messages in (COUNT, STORY):
        whole = chat(client, messages)
        chunks = list(chat(client, messages, stream=True, stream_options={"include_usage": True}))
        assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3, chunks
        assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
        *parts, last = chunks
        assert all(chunk.usage is None for chunk in parts)
        assert last.choices == [] and counts(last.usage) == counts(whole.usage), last
        assert last.timings["draft_n"] == whole.timings["draft_n"], last
        assert parts[0].choices[0].delta.role == "assistant", parts[0]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
        assert text == whole.choices[0].message.content, text
        reasons = [chunk.choices[0].finish_reason for chunk in parts]
        assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}, reasons


def test_stream_without_usage(client):
    chunks = list(chat(client, stream=True))
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason and chunks[-1].timings["predicted_n"] > 0, chunks[-1]


def test_stream_left_early(client):
    with chat(client, STORY, stream=True, max_tokens=2000) as stream:
        next(iter(stream))
    assert chat(client).choices


def test_stream_helper(client):
    whole = chat(client, CODE)
    fields = {"model": whole.model, "messages": CODE, "max_tokens": 48, "temperature": 0, "seed": 1}
    with client.chat.completions.stream(**fields) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events and "content.done" in events, events
    assert final.choices[0].message.content == whole.choices[0].message.content, final


def test_chat_logprobs(client):
    reply = chat(client, STORY, logprobs=True, top_logprobs=4, temperature=1)
    content = reply.choices[0].logprobs.content
    assert reply.usage.completion_tokens - len(content) in (0, 1), "one for each token of the message"
    for token in content:
        assert token.logprob < 0 and len(token.top_logprobs) == 4, token
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] >= token.logprob, token
    spelled = b"".join(bytes(token.bytes) for token in content).decode()
    assert reply.choices[0].message.content in spelled, spelled
    # Chunks carry what the whole has, and no draft changes it.
    chunks = chat(client, STORY, logprobs=True, top_logprobs=4, temperature=1, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == content
    off = {"speculative.n_max": 0}
    plain = chat(client, STORY, logprobs=True, top_logprobs=4, temperature=1, extra_body=off)
    assert plain.choices[0].logprobs.content == content
    assert chat(client).choices[0].logprobs is None


def test_completion(client):
    reply = complete(client)
    assert reply.object == "text_completion" and reply.choices[0].text, reply
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 32, reply
    assert reply.timings["draft_n"] > 0, reply.timings
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == reply.choices[0].text
    assert chunks[-1].choices == [] and counts(chunks[-1].usage) == counts(reply.usage), chunks[-1]
    tokens = complete(client, prompt=[1, 2, 3, 4], max_tokens=3)
    assert tokens.usage.prompt_tokens == 4, tokens


def test_completion_logprobs(client):
    reply = complete(client, logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 32, logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])], logprobs
    assert all(value < 0 for value in logprobs.token_logprobs)
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs)
    # Greedy: the choice is the likeliest.
    assert all(max(top.values()) == value for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs))


def test_several_answers(client):
    reply = chat(client, STORY, n=2, temperature=1)
    assert [choice.index for choice in reply.choices] == [0, 1], reply
    texts = [choice.message.content for choice in reply.choices]
    assert texts[0] != texts[1], texts
    assert [c.message.content for c in chat(client, STORY, n=2, temperature=1).choices] == texts
    streamed = ["", ""]
    for chunk in chat(client, STORY, n=2, temperature=1, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, streamed
    several = complete(client, prompt=[PROMPT, "One day, Tom"], n=2, temperature=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3], several


def test_stop(client):
    text = complete(client).choices[0].text
    middle = text[len(text) // 2 :][:4]
    for stop in (middle, ["never to be seen", middle]):
        (choice,) = complete(client, stop=stop).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(middle)], "stop"), choice
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, stop=middle, stream=True))
    assert streamed == text[: text.index(middle)], streamed
    assert chat(client, max_tokens=1).choices[0].finish_reason == "length"
    assert chat(client, max_completion_tokens=2, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 2


def test_seed(client):
    def text(seed):
        return chat(client, STORY, seed=seed, temperature=1).choices[0].message.content

    assert text(1) == text(1) != text(2)


def test_reasoning(client):
    off = chat(client, STORY, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
    assert not hasattr(off, "reasoning_content") and "think>" not in off.content, off
    # A thought that the prompt has begun is a thought; where the model ends it is the model's business.
    body = {"reasoning_format": "deepseek"}
    begun = [*STORY[:-1], {"role": "user", "content": STORY[-1]["content"] + "<|im_end|>\n<|im_start|>assistant\n<think>\nI"}]
    message = chat(client, begun, extra_body=body).choices[0].message
    assert "<think>" not in message.content, message
    raw = chat(client, STORY, extra_body={"reasoning_format": "none"}).choices[0].message
    assert "<think>" in raw.content and not hasattr(raw, "reasoning_content"), raw


def test_unknown_model(client):
    error, _ = refused(openai.NotFoundError, 404, lambda: chat(client, model="gpt-9"))
    assert error.type == "not_found_error" and "gpt-9" in error.message, error


def test_wrong_values(client):
    def check(named, **fields):
        error, body = refused(openai.BadRequestError, 400, lambda: chat(client, **fields))
        assert error.type == "invalid_request_error" and named in body["message"], body

    check("`temperature`", temperature="hot")
    check("`max_tokens`", max_tokens="many")
    check("`messages[0].role`", messages=[{"role": "nobody", "content": "Hi"}])
    check("`messages`", messages=[])
    check("`top_logprobs`", logprobs=True, top_logprobs=21)
    check("`top_logprobs`", top_logprobs=2)
    check("`stop`", stop=7)
    check("`n`", n=1000)
    check("`logit_bias`", logit_bias={"99999999": 1})
    check("`stream`", extra_body={"stream": "yes"})
    check("`response_format", response_format={"type": "json_object"})
    check("no vision", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])
    # In a stream too, as nothing has been sent yet.
    check("`temperature`", temperature="hot", stream=True)


def test_too_long(client):
    error, body = refused(openai.BadRequestError, 400, lambda: complete(client, prompt=[7] * 100_000))
    assert error.type == "exceed_context_size_error", body
    assert body["n_prompt_tokens"] == 100_000 and 0 < body["n_ctx"] < 100_000, body
    assert str(body["n_ctx"]) in body["message"], body


def test_malformed_json(client):
    def send():
        client.with_options(max_retries=0).post("/chat/completions", cast_to=object, content=b"{")

    refused(openai.BadRequestError, 400, send)
    refused(openai.NotFoundError, 404, lambda: client.post("/nothing", cast_to=object, body={}))


def test_key(client):
    stranger = client.with_options(api_key="another")
    error, _ = refused(openai.AuthenticationError, 401, lambda: chat(stranger))
    assert error.type == "authentication_error", error
    assert stranger.models.list().data, "what is served is no secret"


def test_asynchronously(client):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=KEY) as other:
            return await asyncio.gather(*(chat(other, messages) for messages in (COUNT, STORY, COUNT)))

    first, second, third = asyncio.run(ask())
    assert first.choices == third.choices == chat(client).choices
    assert second.choices == chat(client, STORY).choices


def main():
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    # Drafts of full length: on the toy they cost more than they gain, and left to itself the server soon makes none.
    with Serving(sys.argv[1], "-np", "4", "--draft-fixed", "--api-key", KEY) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, timeout=60, max_retries=0)
        for name, test in tests:
            try:
                test(client)
                print(f"ok      {name}")
            except Exception:
                failed += 1
                print(f"FAILED  {name}\n{traceback.format_exc()}")
        if failed:
            print("--- log of the server:\n" + "".join(server.log))
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
