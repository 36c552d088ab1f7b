"""A question of the wizard as numbered lines, and what is worked out before it."""

from engine.errors import UserError
from engine.report import Line
from engine.wizard.flow import perform
from engine.wizard.question import Choice, Confirm, Step
from tui.plain.dialogue import Answer, Back, Dialogue


def ask(dialogue: Dialogue, step: Step) -> None:
    """Ask one step until it is answered. Lets Back and Leave through."""
    while True:
        while work := step.work():
            dialogue.say(f"  {work.waiting}")
            step.receive(work, perform(work, lambda done: dialogue.say(f"  {done}")))
        question = step.question()
        dialogue.say(*(f"  {line}" for line in question.facts))
        answers = [_answer(choice) for choice in question.choices]
        choice = question.choices[dialogue.choose(answers, question.recommended)]
        if take(dialogue, step, choice):
            return


def take(dialogue: Dialogue, step: Step, choice: Choice) -> bool:
    """Take an answer, its text typed where it asks for one; whether the step is answered."""
    while True:
        try:
            text = dialogue.answer(f"  {choice.asks}: ") if choice.asks else ""
            asked = step.confirm(choice.key, text or choice.usual)
            if asked and not agrees(dialogue, asked):
                return False
            return step.take(choice.key, text or choice.usual)
        except Back:
            if not choice.asks:
                raise
            return False
        except UserError as error:
            dialogue.refuse(error)
            if not choice.asks:
                return False


def agrees(dialogue: Dialogue, asked: Confirm) -> bool:
    """Ask again; whether the person agrees."""
    dialogue.say(f"  {asked.title} {asked.text}")
    answers = [Answer(f"yes: {asked.yes}"), Answer(f"no: {asked.no}")]
    return dialogue.choose(answers, int(not asked.is_usual)) == 0


def _answer(choice: Choice) -> Answer:
    verdict = choice.verdict or Line("", "", "")
    told = ", ".join(filter(None, (f"{verdict.mark} {verdict.label}".strip(), choice.note)))
    return Answer(f"{choice.label}{': ' if told else ''}{told}", choice.reason)
