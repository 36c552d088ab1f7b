"""The Model page: the model under the cursor is what the run starts from.

Every model of the catalog is planned on the chosen device, in a thread, whenever the page is shown
with another device. A folder or hub id is read only after it was typed; nothing is fetched.
"""

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from engine.catalog import ModelCard, read_architecture
from engine.chat.tokenizer_file import check_tokenizer
from engine.errors import UserError
from engine.plan import Device, recommend
from engine.visible import visible
from tui.page import HelpText, Key, Page
from tui.screens.data.path_field import PathField
from tui.screens.help import TextPane
from tui.screens.machine.prospects import Survey, look_at
from tui.screens.model import wording
from tui.screens.model.wording import Candidate
from tui.widgets.choices import Choices
from tui.widgets.confirm import Confirm
from tui.widgets.field import Field
from tui.widgets.pane import Pane

_ALSO_GOOD = 2


class ModelPage(Page):
    """The catalog on the chosen device, and why the one under the cursor."""

    STEP = "Model"
    KEYS = (
        Key("enter", "choose", 1),
        Key("/", "filter", 1),
        Key("o", "own model", 1),
        Key("esc", "back"),
    )
    CSS = """
    ModelPage #models { height: auto; max-height: 15; }
    ModelPage #models Input { display: none; }
    ModelPage #models.-typing PathField { display: block; }
    ModelPage #models.-filtering #filter { display: block; }
    ModelPage #why { height: 1fr; min-height: 5; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "filter the list", show=False),
        Binding("o", "own", "a folder or a hub id", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._device: Device | None = None
        self._survey: Survey | None = None
        self._catalog: list[Candidate] = []
        self._shown: list[Candidate] = []
        self._cached: Collection[str] = ()
        self._own: Candidate | None = None
        self._goes_on = False

    def compose_body(self) -> ComposeResult:
        with Pane(id="models", title=wording.TITLE, subtitle="/ filters, o takes your own"):
            yield Choices([Content.styled("working out what fits…", "$muted")])
            yield PathField(placeholder="a folder, or org/name; tab completes", compact=True)
            yield Field("part of a name", id="filter")
        pane = TextPane("why this one", Content(""))
        pane.id = "why"
        yield pane

    def on_mount(self) -> None:
        self.part(Choices).focus()

    # --- the catalog on the device

    def refresh_from_draft(self) -> None:
        device = self.app.draft.device
        if device is None:
            self._device = self._survey = None
            self.say("·", "no device", "what fits depends on it: esc goes back to Machine")
            return
        planned = " (planned)" if device.planned else ""
        self.show_title(f"{device.name}{planned}")
        if device == self._device:
            self._mark_images()
            return
        self._device, self._survey = device, None
        self.say("·", "planning", f"working out what fits on {device.name}")
        self._plan_all(device)

    @work(group="plan", exclusive=True)
    async def _plan_all(self, device: Device) -> None:
        found = await asyncio.to_thread(look_at, device)
        self._cached = await asyncio.to_thread(
            _find_cached, [prospect.card for prospect in found.prospects]
        )
        self._catalog = [
            Candidate(prospect.card.name, prospect.card.title, prospect.plan, prospect.card)
            for prospect in found.prospects
        ]
        if self._own:
            try:
                self._own = await asyncio.to_thread(_read_own, self._own.name, device)
            except UserError:
                self._own = None  # its folder is gone; the field still has its name
        self._survey = found
        self._mark_images()
        self._show()
        self._point_at(self.app.draft.model or found.proposed.card.name)
        if self._goes_on:
            self._goes_on = False
            self.action_accept()

    def _mark_images(self) -> None:
        """Tell every candidate whether the rows have images: they may have been read since."""
        shows_images = self.app.draft.shows_images
        before = [*self._catalog, *([self._own] if self._own else [])]
        if self._survey is None or all(each.shows_images == shows_images for each in before):
            return
        self._catalog = [replace(each, shows_images=shows_images) for each in self._catalog]
        if self._own:
            self._own = replace(self._own, shows_images=shows_images)
        self._show()
        self._show_here()

    def _point_at(self, name: str) -> None:
        names = [candidate.name for candidate in self._shown]
        if name in names:
            self.part(Choices).cursor = names.index(name)
        else:
            self.part(Choices).cursor = len(names)
            self.part(PathField).value = name
            if not self._own:
                self._read(name)
        self._show_here()

    def _show(self) -> None:
        wanted = self.query_one("#filter", Input).value.strip().lower()
        self._shown = [
            each for each in self._catalog if wanted in each.name or wanted in each.title.lower()
        ]
        lines = [wording.model_line(candidate, self._cached) for candidate in self._shown]
        if self._own:
            lines.append(wording.model_line(self._own, self._cached))
        else:
            lines.append(Content.assemble(wording.OWN, ("  o, then type or paste it", "$muted")))
        self.part(Choices).show_lines(lines)
        nothing = f'nothing matches "{wanted}": esc clears' if wanted and not self._shown else ""
        self.query_one("#models", Pane).show_subtitle(
            visible(nothing, one_line=True) or "/ filters, o takes your own"
        )

    # --- the line under the cursor

    @property
    def _here(self) -> Candidate | None:
        """None on the line for an own model that was not typed yet."""
        cursor = self.part(Choices).cursor
        return self._shown[cursor] if cursor < len(self._shown) else self._own

    @property
    def _on_own_line(self) -> bool:
        return self.part(Choices).cursor >= len(self._shown)

    def on_choices_moved(self, message: Choices.Moved) -> None:
        message.stop()
        if self._survey:
            self._show_here()

    def _show_here(self) -> None:
        assert self._device is not None
        assert self._survey is not None
        self.query_one("#models").set_class(self._on_own_line, "-typing")
        here = self._here
        assumed = ["--assume", self._device.name] if self._device.planned else []
        self.show_command(["models", *assumed])
        if here is None:
            self.say("·", "own model", "enter, then type a folder or org/name; enter reads it")
            self._tell("A folder with config.json of a model that is trained here, or a hub id.")
            return
        self.say(*wording.headline(here, self._device, self._survey.proposed.card.name))
        others = [each for each in self._catalog if each is not here and not each.doubt]
        good = sorted(others, key=lambda each: -each.plan.estimate.total_parameters)
        on_gpu = self._device.kind == "cuda"
        told = wording.why(here, self._device, good[:_ALSO_GOOD] if on_gpu else [])
        self.query_one("#why Static", Static).update(told)

    def _tell(self, text: str) -> None:
        self.query_one("#why Static", Static).update(Content.styled(text, "$muted"))

    # --- a model of one's own

    def _read(self, name: str) -> None:
        self.say("·", "reading", name)
        self._read_typed(name)

    @work(group="own", exclusive=True)
    async def _read_typed(self, name: str) -> None:
        assert self._device is not None
        try:
            own = await asyncio.to_thread(_read_own, name, self._device)
            self._own = replace(own, shows_images=self.app.draft.shows_images)
        except UserError as error:
            self._own = None
            self._show()
            self._show_here()
            self.show_problem(error, kept=f"{name} is still in the field")
            return
        self._show()
        self.part(Choices).focus()
        self._show_here()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        message.stop()
        if message.input.id == "filter":
            self.part(Choices).focus()
        elif name := message.value.strip():
            self._read(name)

    def on_input_changed(self, message: Input.Changed) -> None:
        message.stop()
        if message.input.id == "filter" and self._survey:
            here = self._here
            self._show()
            names = [candidate.name for candidate in self._shown]
            self.part(Choices).cursor = names.index(here.name) if here and here.name in names else 0
            self._show_here()

    def on_path_field_left(self) -> None:
        self.part(Choices).focus()

    def on_path_field_offered(self, message: PathField.Offered) -> None:
        names = "  ".join(visible(name, one_line=True) for name in message.names)
        self.query_one("#models", Pane).show_subtitle(names if len(message.names) > 1 else "")

    def on_field_left(self) -> None:
        self._clear_filter()

    def _clear_filter(self) -> None:
        self.query_one("#filter", Input).value = ""
        self.query_one("#models").remove_class("-filtering")
        self.part(Choices).focus()

    # --- keys

    def action_filter(self) -> None:
        if self._survey:
            self.query_one("#models").add_class("-filtering")
            self.query_one("#filter").focus()

    def action_own(self) -> None:
        if self._survey:
            self.part(Choices).cursor = len(self._shown)
            self.part(PathField).focus()

    def action_back(self) -> None:
        """Escape: close what covers the page, then clear the filter, then go back."""
        if not self.is_covered and self.query_one("#models").has_class("-filtering"):
            self._clear_filter()
        else:
            super().action_back()

    def action_accept(self) -> None:
        """Take the model under the cursor; ask first where it cannot be trained on the device."""
        if self._survey is None:
            self._goes_on = self._device is not None
            if self._goes_on:
                self.say("·", "planning", "goes on when it is known what fits")
        elif self._here is None:
            self.part(PathField).focus()
        elif self._here.doubt:
            self._ask(self._here)
        else:
            self._take(self._here)

    def _ask(self, candidate: Candidate) -> None:
        def answered(agreed: bool | None) -> None:
            if agreed:
                self._take(candidate)

        self.app.push_screen(
            Confirm(
                f"plan {candidate.title} anyway?",
                candidate.doubt,
                yes="plans it",
                no="goes back to the list",
            ),
            answered,
        )

    def _take(self, candidate: Candidate) -> None:
        draft = self.app.draft
        if draft.model != candidate.name:
            draft.model, draft.statistics, draft.counted = candidate.name, None, None
        self.app.next_step()

    def help_for(self, focused: Widget | None) -> HelpText:
        if isinstance(focused, PathField):
            return HelpText(
                "a model of your own",
                [
                    ("folder", "one that holds config.json and the weights"),
                    ("org/name", "a repository that the hub cache or the catalog knows"),
                    ("", "nothing is fetched, and no code of a model is ever run"),
                ],
            )
        return HelpText(
            "the model that the run starts from",
            [
                ("needs", "GiB on the device at the peak, with the recommended values"),
                ("tight", "less than 1 GiB would be left"),
                ("plan only", "fits, and this version cannot train it yet"),
                ("reads", "image: text too; no images: the rows have some, and it reads only text"),
                ("thinks", "[THINK] are tokens, <think> is plain text, on/off is asked for"),
                ("download", "the weights, once; on disk: in the hub cache already"),
            ],
            ("models",),
        )


def _read_own(name: str, device: Device) -> Candidate:
    architecture = read_architecture(name)
    check_tokenizer(name)
    plan = recommend(architecture, device)
    return Candidate(name, name, plan, architecture.card, architecture)


def _find_cached(cards: list[ModelCard]) -> set[str]:
    """Names of the models whose config.json is in the hub cache."""
    from huggingface_hub import try_to_load_from_cache

    return {
        card.name
        for card in cards
        for repository in card.repositories[:1]
        if isinstance(try_to_load_from_cache(repository.id, "config.json"), str)
    }
