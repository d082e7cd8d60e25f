"""Conversations from a model behind an OpenAI-compatible endpoint.

What the model writes is not believed: each answer is read (`captioners.instruct.parsing`), checked
(`filters.instruct.check`) and searched for leaks (`captioners.instruct.leaks`). One that fails costs what it costs, is
told among the findings, and another one is asked for, with another seed, up to ``instruct.writer.answers``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from captioners.chat import NoAnswer, PaidChat, model_identity
from captioners.completions import ChatRequest, gather_all
from captioners.instruct import parsing, prompting
from captioners.instruct.leaks import leaks
from captioners.instruct.parsing import Parsed
from captioners.instruct.prompting import Message, Prompts
from filters.instruct import CHECKS_VERSION, check
from pairmill import answers
from pairmill.instructions import KINDS, Context, Finding, Instruction, Task
from pairmill.sources.download import in_own_loop
from pairmill.stage import Resources
from pairmill.store import Dataset
from schemas import config
from schemas.reasons import DEFERRED, Reason

VERSION = 1
"""Raised when the same answers make other conversations."""


@dataclass(frozen=True)
class Questions:
    """What a model is asked for tasks, and what is made of its answers: a pure function of its fields."""

    model: str
    """Name and revision."""
    prompts: Prompts
    temperature: float
    top_p: float
    max_tokens: int
    answers: int
    max_texts: int
    max_boxes: int
    seed: int

    @classmethod
    def of(cls, run: config.RunConfig) -> Questions:
        """As a config asks: ``instruct`` and ``seed``.

        Raises:
            ConfigError: a prompt is not as it should be.
        """
        asked, writer = run.instruct, run.instruct.writer
        return cls(
            model_identity(writer),
            Prompts.load(),
            writer.temperature,
            writer.top_p,
            writer.max_tokens,
            writer.answers,
            asked.max_texts,
            asked.max_boxes,
            run.seed,
        )

    def identity(self) -> dict[str, Any]:
        """What determines the conversations, but for the model's own whims."""
        return {
            "model": self.model,
            "prompts": {kind: self.prompts.digest(kind) for kind in KINDS},
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "answers": self.answers,
            "max_texts": self.max_texts,
            "max_boxes": self.max_boxes,
            "seed": self.seed,
            "checks": CHECKS_VERSION,
            "version": VERSION,
        }

    def messages(self, task: Task) -> tuple[Message, ...]:
        """What is said to the model."""
        return tuple(self.prompts.messages(task, self.max_texts, self.max_boxes))

    def request(self, task: Task, number: int, messages: tuple[Message, ...] | None = None) -> ChatRequest:
        """What is asked for the answer of this number. Its seed follows from the run's, the uid, the kind and the
        number."""
        sent = self.messages(task) if messages is None else messages
        seed = answer_seed(self.seed, task.context.uid, task.kind, number)
        return ChatRequest(sent, self.max_tokens, self.temperature, self.top_p, seed)

    def attempt(self, task: Task) -> Attempt:
        """Begin with a task."""
        return Attempt(self, task)

    def judge(self, task: Task, text: str) -> Parsed | list[Finding]:
        """An answer as turns and boxes, or what is wrong with it."""
        told = prompting.told(task.context, self.max_boxes)
        read = parsing.parse(text, task.kind, told, self.prompts.question(task.context.uid, text))
        if isinstance(read, Finding):
            return [read]
        prompt, texts = self.prompts.of(task.kind), prompting.texts(task.context, self.max_texts)
        found = leaks(read.turns, read.boxes, prompt, texts)
        found += check(read.turns, read.boxes, task.kind, task.context)
        return found or read


class Attempt:
    """The answers to one task so far, and what follows from them."""

    def __init__(self, questions: Questions, task: Task) -> None:
        self._questions = questions
        self.task = task
        self._messages: tuple[Message, ...] = ()
        self.done: Instruction | None = None
        """What became of the task, once that is known."""
        self._findings: list[Finding] = []
        self._answers = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._cost = 0.0
        if prompting.something_to_say(task, questions.max_texts, questions.max_boxes):
            self._messages = questions.messages(task)
        else:
            what = "no box" if task.kind == "grounding" else "no text" if task.kind == "conversation" else "nothing"
            self._fail(Reason.WRITER_NOTHING_TO_SAY.value, f"the model could be told {what}")

    @property
    def request(self) -> ChatRequest:
        """What to ask next."""
        return self._questions.request(self.task, self._answers, self._messages)

    def answered(self, text: str, prompt_tokens: int, completion_tokens: int, cost: float) -> None:
        """The model answered the last `request`."""
        self._spend(prompt_tokens, completion_tokens, cost)
        read = self._questions.judge(self.task, text)
        if isinstance(read, Parsed):
            self.done = self._instruction(turns=read.turns, boxes=read.boxes)
        else:
            self._refuse(read)

    def unanswered(self, failure: NoAnswer) -> None:
        """It gave no answer, or none that can be used. Where one may come later, the task waits for it."""
        if failure.reason in DEFERRED:
            self._spend(failure.prompt_tokens, failure.completion_tokens, failure.cost, answers=0)
            self._fail(failure.reason.value, failure.detail)
        else:
            self._spend(failure.prompt_tokens, failure.completion_tokens, failure.cost)
            self._refuse([Finding(failure.reason.value, failure.detail)])

    def _spend(self, prompt_tokens: int, completion_tokens: int, cost: float, answers: int = 1) -> None:
        self._answers += answers
        self._prompt_tokens += prompt_tokens
        self._completion_tokens += completion_tokens
        self._cost += cost

    def _refuse(self, findings: Sequence[Finding]) -> None:
        self._findings += findings
        if self._answers >= self._questions.answers:
            self._fail(findings[0].reason, findings[0].detail)

    def _fail(self, reason: str, detail: str) -> None:
        self.done = self._instruction(reason=reason, detail=detail)

    def _instruction(self, **more: Any) -> Instruction:
        return Instruction(
            self.task.kind,
            writer=self._questions.model,
            prompt_digest=self._digest() if self._messages else None,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cost=self._cost,
            answers=self._answers,
            findings=tuple(self._findings),
            **more,
        )

    def _digest(self) -> str:
        """sha256 (hex) of all that was sent but the seed, in which the answers to one task differ."""
        asked = self._questions
        sent = [asked.model, list(self._messages), asked.max_tokens, asked.temperature, asked.top_p]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


def answer_seed(seed: int, uid: str, kind: str, number: int) -> int:
    """The seed of a request: 31 bits, since some servers take no more."""
    digest = hashlib.sha256(f"{seed}\n{uid}\n{kind}\n{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class EndpointWriter:
    """Asks an endpoint while the stage runs. Not part of its identity: where the model is (``base_url``), how fast it
    is asked, the price and the budget."""

    judges: ClassVar[bool] = True

    questions: Questions
    chat: PaidChat = field(compare=False)
    resources: Resources = field(default=Resources(cpus=0.25, rows=1024, actor=True, workers=2), compare=False)
    """Two workers, so that one goes on while the other waits for a shard's slowest answers; the limits are the whole
    run's, and each has its part of them. 1,000 rows a call: 77% of a bare loop's throughput with 256, 90% with 1,000
    (`benchmarks/endpoint.py`)."""

    @classmethod
    def of(cls, run: config.RunConfig) -> EndpointWriter:
        """The writer that ``instruct.writer`` describes.

        Raises:
            ConfigError: no or a wrong base_url, or no name.
        """
        asked = run.instruct
        return cls(Questions.of(run), PaidChat.of(run.dataset, asked.writer, asked.price, asked.budget))

    def identity(self) -> Mapping[str, Any]:
        """What determines its answers."""
        return self.questions.identity()

    def worth_asking(self, reason: str) -> bool:
        """Whether tasks that got no answer for this reason may get one now: not while the budget is spent."""
        limits = self.chat.budget
        if reason != Reason.WRITER_BUDGET or (limits.tokens is None and limits.money is None):
            return True
        nothing = Context("", (), (), 0, 0)
        asked = (self.questions.request(Task(nothing, kind), 0) for kind in KINDS)
        least = min((self.chat.bound(request) for request in asked), key=lambda bound: bound.tokens)
        tokens, money = answers.spent(Dataset(self.chat.dataset))
        return (limits.tokens is None or tokens + least.tokens <= limits.tokens) and (
            limits.money is None or money + least.cost <= limits.money
        )

    def open(self) -> Callable[[Sequence[Task]], list[Instruction]]:
        """Check that there is a key.

        Raises:
            ConfigError: there is none although the host is on the public internet, or it cannot be sent safely.
        """
        self.chat.check_key()

        def write(tasks: Sequence[Task]) -> list[Instruction]:
            return in_own_loop(lambda: self._write(tasks)) if tasks else []

        return write

    async def _write(self, tasks: Sequence[Task]) -> list[Instruction]:
        async with self.chat as chat:
            return await gather_all([self._one(chat, task) for task in tasks])

    async def _one(self, chat: PaidChat, task: Task) -> Instruction:
        attempt = self.questions.attempt(task)
        while attempt.done is None:
            try:
                answer = await chat.ask(task.context.uid, task.shard, task.kind, attempt.request)
            except NoAnswer as failure:
                attempt.unanswered(failure)
            else:
                attempt.answered(answer.text or "", answer.prompt_tokens, answer.completion_tokens, answer.cost)
        return attempt.done
