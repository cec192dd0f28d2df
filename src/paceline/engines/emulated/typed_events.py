"""How is an answer written as events that have a type? OpenAI's Responses, Anthropic's Messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from paceline.engines.emulated.formats import NUMBER, SEQUENCE, Format, Part, event, numbered


class Responses(Format):
    """OpenAI's Responses: events with a type, numbered in sequence."""

    prefix = "resp_"

    def _event(self, kind: str, number: int | str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _item(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _text(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        cut = status == "incomplete"
        body: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "metadata": None,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0,
            "usage": None,
        }
        if output:
            usage = self.usage()
            body["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        return body

    def _final(self) -> dict[str, Any]:
        part = self.parts[0]
        status = "completed" if part.finish_reason == "stop" else "incomplete"
        return self._response(status, [self._item([self._text(part.text)], "completed")])

    def opening(self, part: Part) -> bytes:
        begun = self._response("in_progress", [])
        item = self._item([], "in_progress")
        return (
            self._event("response.created", 0, response=begun)
            + self._event("response.in_progress", 1, response=begun)
            + self._event("response.output_item.added", 2, output_index=0, item=item)
            + self._event("response.content_part.added", 3, **self._place(), part=self._text(""))
        )

    def token(self, part: Part, finish_reason: str | None = None) -> Callable[[int], bytes]:
        kind = "response.output_text.delta"
        delta = self._event(kind, SEQUENCE, **self._place(), delta=f" t{NUMBER}", logprobs=[])
        return numbered(delta, part, sequence=4)

    def closing(self) -> bytes:
        part, place, number = self.parts[0], self._place(), 4 + self.parts[0].tokens
        text, final = self._text(part.text), self._final()
        done = self._event(
            "response.output_text.done", number, **place, text=part.text, logprobs=[]
        )
        item = final["output"][0]
        return (
            done
            + self._event("response.content_part.done", number + 1, **place, part=text)
            + self._event("response.output_item.done", number + 2, output_index=0, item=item)
            + self._event(f"response.{final['status']}", number + 3, response=final)
        )

    def whole(self) -> bytes:
        return msgspec.json.encode(self._final())


class Messages(Format):
    """Anthropic's Messages."""

    prefix = "msg_"

    def _message(self, **rest: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            **rest,
        }

    def _stop_reason(self) -> str:
        return "end_turn" if self.parts[0].finish_reason == "stop" else "max_tokens"

    def opening(self, part: Part) -> bytes:
        usage = {"input_tokens": len(part.prompt), "output_tokens": 0}
        message = self._message(content=[], stop_reason=None, stop_sequence=None, usage=usage)
        block = {"type": "text", "text": ""}
        return _typed({"type": "message_start", "message": message}) + _typed(
            {"type": "content_block_start", "index": 0, "content_block": block}
        )

    def token(self, part: Part, finish_reason: str | None = None) -> Callable[[int], bytes]:
        delta = {"type": "text_delta", "text": f" t{NUMBER}"}
        return numbered(_typed({"type": "content_block_delta", "index": 0, "delta": delta}), part)

    def closing(self) -> bytes:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": self.answer_tokens}
        return (
            _typed({"type": "content_block_stop", "index": 0})
            + _typed({"type": "message_delta", "delta": delta, "usage": usage})
            + _typed({"type": "message_stop"})
        )

    def whole(self) -> bytes:
        usage = {
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.answer_tokens,
            "cache_read_input_tokens": self.parts[0].cached_tokens,
        }
        content = [{"type": "text", "text": self.parts[0].text}]
        return msgspec.json.encode(
            self._message(
                content=content, stop_reason=self._stop_reason(), stop_sequence=None, usage=usage
            )
        )


def _typed(body: Mapping[str, Any]) -> bytes:
    return event(body, body["type"])
