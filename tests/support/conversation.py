"""A person at the wizard's plain lines."""

from tui.plain import Dialogue


class Conversation:
    """A person who gives prepared answers and then ctrl+d; everything that they read."""

    def __init__(self, *answers: str) -> None:
        self._answers = iter(answers)
        self.lines: list[str] = []
        self.dialogue = Dialogue(self._read, self.lines.append)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def _read(self, prompt: str) -> str:
        answer = next(self._answers, None)
        self.lines.append(prompt + (answer or ""))
        if answer is None:
            raise EOFError
        return answer

    def headings(self) -> list[str]:
        return [line.split("  ")[1].split(":")[0] for line in self.lines if " of 6  " in line]
