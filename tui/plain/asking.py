"""A question of the wizard as numbered lines, and what is worked out before it."""

from collections.abc import Collection

from engine.errors import UserError
from engine.report import Line
from engine.wizard.flow import perform
from engine.wizard.question import Choice, Confirm, Step
from tui.plain.dialogue import Answer, Back, Dialogue, numbered


def ask(dialogue: Dialogue, step: Step) -> None:
    """Ask one step until it is answered. Lets Back and Leave through.

    What is asked again shows only the lines that have changed.
    """
    before: Collection[str] = ()
    while True:
        while work := step.work():
            dialogue.say(f"  {work.waiting}")
            step.receive(work, perform(work, lambda done: dialogue.say(f"  {done}")))
        question = step.question()
        about = (question.headline, *question.facts)
        lines = [f"  {each}" for line in about for each in str(line).splitlines()]
        dialogue.say(*(line for line in lines if line not in before))
        answers = [_answer(choice) for choice in question.choices]
        try:
            typed = bool(question.typed)
            answer = dialogue.choose(answers, question.recommended, before, typed=typed)
            text = answer if isinstance(answer, str) else ""
            choice = question.choice(question.typed) if text else question.choices[int(answer)]
            if take(dialogue, step, choice, text):
                return
        except Back:
            if not step.back():
                raise
        before = {*lines, *numbered(answers, question.recommended)}


def take(dialogue: Dialogue, step: Step, choice: Choice, typed: str = "") -> bool:
    """Take an answer, its text typed where it asks for one; whether the step is answered."""
    while True:
        text = typed
        try:
            if choice.asks and not typed:
                text = dialogue.answer(f"  {choice.asks}: ") or choice.usual
            asked = step.confirm(choice.key, text)
            if asked and not agrees(dialogue, asked):
                return False
            return step.take(choice.key, text)
        except Back:
            return False
        except UserError as error:
            dialogue.refuse(error)
            if typed or not choice.asks:
                return False


def agrees(dialogue: Dialogue, asked: Confirm) -> bool:
    """Ask again; whether the person agrees."""
    dialogue.say(f"  {asked.title} {asked.text}")
    answers = [Answer(f"yes: {asked.yes}"), Answer(f"no: {asked.no}")]
    return dialogue.choose(answers, int(not asked.is_usual)) == 0


def _answer(choice: Choice) -> Answer:
    verdict = choice.verdict or Line("", "", "")
    beside = ", ".join(filter(None, (f"{verdict.mark} {verdict.label}".strip(), choice.note)))
    label = f"{choice.label}: {beside}" if beside else choice.label
    return Answer(label, choice.reason or beside, choice.key)
