"""Rows in the shapes that people have: what is read of them, what is told, what is refused."""

import json

import pytest

from engine.chat.conversation import Image, RowFormat, RowProblem, Think
from engine.chat.row import read_row
from engine.config import DatasetConfig

TOOL = {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {}}}
CHOSEN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
REJECTED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]
ASKED, GOOD, BAD = CHOSEN[:1], CHOSEN[1:], REJECTED[1:]
HH = "\n\nHuman: {}\n\nAssistant: {}"


def read(row, **keys):
    return read_row(row, RowFormat.from_config(DatasetConfig(path=".", **keys)))


def spoken(conversation):
    """Each message as ROLE:TEXT; thinking in <>, an image as #, calls as NAME(ARGUMENTS)."""

    def shown(part):
        if isinstance(part, Image):
            return "#"
        return f"<{part.text}>" if isinstance(part, Think) else part.text

    return [
        f"{message.role}:{''.join(map(shown, message.parts))}"
        + "".join(f"{call.name}({call.arguments})" for call in message.tool_calls)
        for message in conversation.messages
    ]


LISTED = ["user:q\n\nA. x\nB. y", "assistant:B. y"]
CHOICES = [
    pytest.param({"question": "q", "choices": ["x", "y"], "answer": 1}, LISTED, id="MMLU"),
    pytest.param(
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        LISTED,
        id="ARC",
    ),
    pytest.param(
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
        ["user:q\n\n1. x\n2. y", "assistant:1. x"],
        id="ARC with numbers",
    ),
    pytest.param({"ctx": "q", "endings": ["x", "y"], "label": "1"}, LISTED, id="HellaSwag"),
    pytest.param(
        {"article": "c", "question": "q", "options": ["x", "y"], "answer": "B"},
        ["user:c\n\nq\n\nA. x\nB. y", "assistant:B. y"],
        id="RACE",
    ),
    pytest.param(
        {"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"},
        LISTED,
        id="MedQA",
    ),
    pytest.param(
        {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
         "answerKey": "B"},
        LISTED,
        id="OpenBookQA",
    ),
    pytest.param({"input": "q", "A": "x", "B": "y", "target": "B"}, LISTED, id="columns A, B"),
    pytest.param(
        {"question": "q", "options": ["A)x", "B)y"], "correct": "B"},
        ["user:q\n\nA)x\nB)y", "assistant:B)y"],
        id="AQuA",
    ),
    pytest.param(
        {"question": "x or y?", "options": '["x", "y"]', "answer": "neither of them"},
        ["user:x or y?", "assistant:neither of them"],
        id="options that the question holds, and an answer of other words",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        *CHOICES,
        pytest.param(
            {"system_prompt": "s", "question": "q", "response": "a"},
            ["system:s", "user:q", "assistant:a"],
            id="OpenOrca",
        ),
        pytest.param(
            {"instruction": "q", "context": "c", "response": "a"},
            ["user:c\n\nq", "assistant:a"],
            id="Dolly",
        ),
        pytest.param(
            {"instruction": "q", "context": "", "response": "a"},
            ["user:q", "assistant:a"],
            id="Dolly without a context",
        ),
        pytest.param(
            {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}},
            ["user:c\n\nq", "assistant:a"],
            id="SQuAD",
        ),
        pytest.param(
            {"Question": "q", "Complex_CoT": "t", "Response": "a"},
            ["user:q", "assistant:<t>a"],
            id="medical-o1",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "q"}], "reasoning": "t", "answer": "a"},
            ["user:q", "assistant:<t>a"],
            id="Dolphin-R1",
        ),
        pytest.param(
            {"input": [{"role": "user", "content": "q"}], "output": "<think>t</think>a"}
            | {"reasoning": "on", "system_prompt": "s"},
            ["system:s", "user:q", "assistant:<t>a"],
            id="Nemotron",
        ),
        pytest.param(
            {"query": "q", "tools": [TOOL], "answers": '[{"name": "w", "arguments": {"c": 1}}]'},
            ["user:q", "assistant:w({'c': 1})"],
            id="xLAM",
        ),
        pytest.param(
            {"instruction": "q2", "input": "i", "output": "a2", "history": [["q1", "a1"]]},
            ["user:q1", "assistant:a1", "user:q2\n\ni", "assistant:a2"],
            id="Alpaca with a history",
        ),
        pytest.param(
            {
                "system": "SYSTEM: Help. Use them if required -\n"
                '{"name": "w", "parameters": {}}\n{"name": "v", "parameters": {}}',
                "chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "w", "arguments":'
                " '{\"c\": 1}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: 7\n\n\nASSISTANT: a"
                " <|endoftext|>",
            },
            ["system:Help.", "user:q", "assistant:w({'c': 1})", "tool:7", "assistant:a"],
            id="Glaive",
        ),
        pytest.param(
            {
                "prompt": {
                    "role": "prompter",
                    "text": "q",
                    "replies": [
                        {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                        {"role": "assistant", "text": "a", "rank": 0, "replies": []},
                        {"role": "assistant", "text": "no", "deleted": True, "replies": []},
                    ],
                }
            },
            ["user:q", "assistant:a"],
            id="OASST tree",
        ),
        pytest.param(
            {"data": ["q", "a", "r", "b"]},
            ["user:q", "assistant:a", "user:r", "assistant:b"],
            id="UltraChat",
        ),
        pytest.param({"conversations": ["q", "a"]}, ["user:q", "assistant:a"], id="LIMA"),
        pytest.param(
            {"image": "a.png", "question": "q", "multiple_choice_answer": "a", "answers": []},
            ["user:#q", "assistant:a"],
            id="VQAv2",
        ),
        pytest.param(
            {"image": "a.png", "question": "q", "answers": ["b", "a", "a"]},
            ["user:#q", "assistant:a"],
            id="DocVQA: what most answer",
        ),
        pytest.param(
            {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a", "source": "x"}] * 2},
            ["user:#q", "assistant:a", "user:q", "assistant:a"],
            id="The Cauldron",
        ),
        pytest.param(
            {"conversation": [{"input": "q", "output": "a"}]},
            ["user:q", "assistant:a"],
            id="Capybara",
        ),
        pytest.param(
            {
                "system_prompt": "s",
                "interactions": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}],
            },
            ["system:s", "user:q", "assistant:a"],
            id="mistral-finetune",
        ),
        pytest.param(
            {"problem": "q", "solution": "a", "answer": "4"}, ["user:q", "assistant:a"], id="MATH"
        ),
        pytest.param({"inputs": "q", "targets": "a"}, ["user:q", "assistant:a"], id="Aya, FLAN"),
        pytest.param(
            {"text": "### Human: q### Assistant: a"}, ["user:q", "assistant:a"], id="Guanaco"
        ),
        pytest.param(
            {"conversations": HH.format("q", "a")}, ["user:q", "assistant:a"], id="transcript"
        ),
        pytest.param(
            {
                "query": "q",
                "passages": {"is_selected": [0], "passage_text": ["c", "d"]},
                "answers": ["a"],
            },
            ["user:c\n\nd\n\nq", "assistant:a"],
            id="MS MARCO",
        ),
        pytest.param(
            {"question": "q", "context": {"contexts": ["c", "d"]}, "long_answer": "a"},
            ["user:c\n\nd\n\nq", "assistant:a"],
            id="PubMedQA",
        ),
        pytest.param(
            {"story": "c", "questions": ["q", "r"], "answers": {"input_text": ["a", "b"]}},
            ["user:c\n\nq", "assistant:a", "user:r", "assistant:b"],
            id="CoQA",
        ),
        pytest.param(
            {"definition": "c", "inputs": "q", "targets": "a"},
            ["user:c\n\nq", "assistant:a"],
            id="Natural Instructions",
        ),
        pytest.param(
            {"inputs": [5, 7], "inputs_pretokenized": "q", "targets_pretokenized": "a"},
            ["user:q", "assistant:a"],
            id="P3",
        ),
        pytest.param(
            {"question": "q", "solutions": '["a", "b"]'}, ["user:q", "assistant:a"], id="APPS"
        ),
        pytest.param(
            {"messages": [json.dumps(each) for each in CHOSEN]},
            ["user:q", "assistant:good"],
            id="messages as JSON texts",
        ),
        pytest.param({"question": "q", "answer": 4.5}, ["user:q", "assistant:4.5"], id="a number"),
        pytest.param({"question": "q", "answer": True}, ["user:q", "assistant:true"], id="BoolQ"),
        pytest.param(
            {"interactions": [{"is_user": True, "text": "q"}, {"is_user": False, "text": "a"}]},
            ["user:q", "assistant:a"],
            id="mistral-finetune",
        ),
        pytest.param(
            {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}]},
            ["user:q", "assistant:a"],
            id="speakers",
        ),
        pytest.param({"query": "q", "label": ["a"]}, ["user:q", "assistant:a"], id="ChartQA"),
        *(
            pytest.param(
                {"question": "q", name: each, "ground_truth": "a"},
                ["user:b\n\nc\n\nq", "assistant:a"],
                id=f"RAG, {name}",
            )
            for name, each in {
                "documents": ["b", "c"],
                "retrieved_contexts": ["b", "c"],
                "passages": [{"title": "t", "text": "b"}, {"title": "u", "text": "c"}],
            }.items()
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "q"},
                               {"from": "gpt", "value": '<|fn_start|>{"name": "f"}<|fn_end|>'},
                               {"from": "function-response", "value": "r"},
                               {"from": "gpt", "value": "a"}]},
            ["user:q", "assistant:f({})", "tool:r", "assistant:a"],
            id="MathAndMagic",
        ),
    ],
)  # fmt: skip
def test_rows_as_they_circulate(row, messages):
    found = read(row)
    assert spoken(found) == messages
    assert all(message.learn for message in found.messages)


@pytest.mark.parametrize("column", ["tools", "available_tools", "functions", "tools_json"])
def test_tools_stand_in_any_usual_column(column):
    row = {"messages": CHOSEN, column: [TOOL]}
    assert read(row).tools[0]["function"]["name"] == "w"
    assert not read(row).unread


def test_parameters_by_name_or_with_types_of_python_become_a_json_schema():
    by_name = {
        "type": {"description": "kind", "type": "str", "default": "x"},
        "count": {"description": "n", "type": "int, optional"},
        "at": {"description": "where", "type": "List[float]"},
        "how": {"description": "f", "type": "Callable"},
    }
    nested = {"type": "dict", "properties": {"n": {"type": "float"}}}
    row = {"query": "q", "answer": "a", "tools": [{"name": "v", "parameters": by_name}]}
    (tool,) = read(row).tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"description": "kind", "type": "string", "default": "x"},
            "count": {"description": "n", "type": "integer"},
            "at": {"description": "where", "type": "array"},
            "how": {"description": "f (Callable)"},
        },
        "required": ["at", "how"],
    }
    assert [note.id for note in read(row).notes] == ["tools_rewritten"]
    (tool,) = read(row | {"tools": [{"name": "v", "parameters": nested}]}).tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"n": {"type": "number"}},
    }


def test_only_last_keeps_earlier_answers_out_of_the_loss():
    found = read({"messages": [*CHOSEN, *REJECTED], "only_last": True})
    assert [m.learn for m in found.messages if m.role == "assistant"] == [False, True]
    assert "only_last" in [note.id for note in found.notes]
    assert all(m.learn for m in read({"messages": CHOSEN, "only_last": False}).messages)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "answer": "a", "rationale": "r"}, {"rationale": "r"}),
        ({"messages": CHOSEN, "note": "n", "empty": "", "none": None}, {"note": "n"}),
        # What repeats what was read is not lost.
        ({"messages": CHOSEN, "prompt": "q", "chosen": CHOSEN, "id": 1}, {"id": 1}),
        ({"messages": CHOSEN, "rejected": REJECTED}, {"rejected": REJECTED}),
        (
            {"messages": [ASKED[0] | {"lang": "en", "thinking": "t"}, GOOD[0] | {"train": False}]},
            {"messages[].lang": "en", "messages[].thinking": "t", "messages[].train": False},
        ),
        ({"system": "other", "messages": [{"role": "system", "content": "s"}, *CHOSEN]},
         {"system": "other"}),
    ],
)  # fmt: skip
def test_what_no_rule_reads_is_kept_to_be_told(row, unread):
    assert read(row).unread == unread


def test_prefix_is_told():
    row = {"messages": [*ASKED, GOOD[0] | {"prefix": True}]}
    assert [note.id for note in read(row).notes] == ["prefix_not_kept"]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"},
         {"field_question": "prompt", "field_answer": "chosen"}),
        ({"chosen": CHOSEN, "rejected": REJECTED}, {"field_messages": "chosen"}),
        ({"prompt": "q", "chosen": CHOSEN, "rejected": REJECTED}, {"field_messages": "chosen"}),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
         {"field_question": "prompt", "field_answer": "chosen"}),
        ({"conversations": [{"from": "human", "value": "q"}],
          "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
         {"field_question": "conversations", "field_answer": "chosen"}),
        ({"chosen": HH.format("q", "good"), "rejected": HH.format("q", "bad")},
         {"field_messages": "chosen"}),
        ({"prompt": "q", "completion": "good", "label": True}, {"field_label": "label"}),
        ({"prompt": ASKED, "completion": GOOD, "label": 1}, {"field_label": "label"}),
        ({"messages": CHOSEN, "kto_tag": True}, {"field_label": "kto_tag"}),
    ],
)  # fmt: skip
def test_preferences_are_refused_with_the_keys_that_learn_the_good_answers(row, keys):
    with pytest.raises(RowProblem) as refused:
        read(row)
    assert all(f"`{key}: {column}`" in refused.value.fix for key, column in keys.items())
    assert spoken(read(row, **keys)) == ["user:q", "assistant:good"]
    if "field_label" in keys:
        bad = row | {keys["field_label"]: False}
        for settings in (dict[str, str](), keys):
            with pytest.raises(RowProblem, match=r"verdict|is false"):
                read(bad, **settings)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "compared"),
        ({"instruction": "q", "completions": [{"response": "a"}] * 2, "output": "a"}, "rated"),
        ({"message_id": "m", "parent_id": "p", "text": "t", "role": "assistant"}, "a tree"),
        ({"question": "q", "answers": {"text": [], "answer_start": []}}, "no answer"),
    ],
)
def test_what_cannot_be_learned_is_named(row, what):
    with pytest.raises(RowProblem, match=what):
        read(row)


QA = {"question": "q", "answer": "a"}
OPTIONS = {"question": "q", "choices": ["x", "y"]}


@pytest.mark.parametrize(
    ("row", "said", "keys", "repaired"),
    [
        # Repairs by keys of the entry.
        ({"translation": {"en": "q", "fr": "a"}}, "`field_question: translation.en`",
         {"field_question": "translation.en", "field_answer": "translation.fr"}, None),
        ({"instruction_zh": "q", "output_zh": "a"}, "`field_answer: output_zh`",
         {"field_question": "instruction_zh", "field_answer": "output_zh"}, None),
        ({"document": "q", "summary": "a", "id": "1"}, "`field_question: document`",
         {"field_question": "document", "field_answer": "summary"}, None),
        ({"train": [QA], "valid": [QA]}, "in one folder, a row a line (train.jsonl, valid.jsonl)",
         {}, QA),
        ({"question": "q", "snippets": ["b", "c"], "said": ""}, "name yours in field_question",
         {"field_answer": "said"}, {"question": "q", "said": "a"}),
        ({"name": "n", "problem": "q", "r1_solution": "a", "reasoning": "t", "test_cases": "c"},
         "`field_answer: r1_solution`",
         {"field_question": "problem", "field_answer": "r1_solution", "field_thinking": "why"},
         None),
        ({"role_1": "x", "message_1": "q", "message_2": "a"}, "name yours in field_question",
         {"field_question": "message_1", "field_answer": "message_2"}, None),
        ({"query": {"en": "q", "de": "f"}, "answers": ["a"]}, "query.en",
         {"field_question": "query.en"}, None),
        ({"question": "q", "response_j": "a", "response_k": "b"}, "`field_answer: response_j`",
         {"field_question": "question", "field_answer": "response_j"}, None),
        ({"question": "q", "response_a": "a", "response_b": "b"}, "name it in field_answer",
         {"field_question": "question", "field_answer": "better"},
         {"question": "q", "better": "a", "response_b": "b"}),
        ({"data_name": "code", "chat_rounds": [*ASKED, {"role": "bot", "content": "a"}]},
         "`field_messages: chat_rounds`", {"field_messages": "chat_rounds"}, None),
        ({"dialogue": "q", "summary": None}, "name yours in field_question",
         {"field_question": "dialogue", "field_answer": "summary"},
         {"dialogue": "q", "summary": "a"}),
        ({"talk": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         "`field_messages: talk`", {"field_messages": "talk"}, None),
        ({"dialog": [{"speaker": "Ann", "text": "q"}, {"speaker": "Bob", "text": "a"}]},
         "in the config's `roles`", {"roles": {"user": ["Ann"], "assistant": ["Bob"]}}, None),
        ({"messages": [{"who": "user", "content": "q"}, {"who": "bot", "content": "a"}]},
         "message_property_mappings", {"message_property_mappings": {"role": "who"}}, None),
        # Repairs of the row.
        ({"text": "a"}, '"question": "Tell what you know of ..."', {}, QA),
        ({"question": "q", "answers": {"text": []}}, "Write the answer as a string", {}, QA),
        (OPTIONS | {"answer": 2}, "the right choice's own text in answer", {},
         OPTIONS | {"answer": "y"}),
        (OPTIONS | {"answer": "E"}, "name another column in field_answer",
         {"field_answer": "gold"}, OPTIONS | {"answer": "E", "gold": "B"}),
        ({"question": "q", "choices": ["B", "A"], "answer": "A"}, '"label": ["1", "2"]', {},
         {"question": "q", "choices": {"text": ["B", "A"], "label": ["1", "2"]}, "answer": "2"}),
        ({"message_id": "m", "parent_id": "p", "text": "t", "role": "assistant"},
         "join the rows by parent_id", {},
         {"messages": [{"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}]}),
        ({"message_id": "m", "parent_id": "p", "text": "t", "role": "assistant"},
         "Take the file of whole trees", {},
         {"prompt": {"role": "prompter", "text": "q",
                     "replies": [{"role": "assistant", "text": "a"}]}}),
    ],
)  # fmt: skip
def test_the_repair_that_a_refusal_proposes_reads_the_row(row, said, keys, repaired):
    with pytest.raises(RowProblem) as refused:
        read(row)
    assert said in refused.value.fix
    *_, asked, answered = spoken(read(repaired or row, **keys))
    assert asked in ("user:q", LISTED[0], "user:q\n\n1. B\n2. A")
    assert answered in ("assistant:a", LISTED[1], "assistant:2. A")


def test_choices_that_a_key_names_must_be_choices():
    with pytest.raises(RowProblem, match="no choices") as refused:
        read(QA | {"notes": 7}, field_choices="notes")
    assert '["Paris", "Rome"]' in refused.value.fix
    row = {"question": "q", "notes": ["x", "y"], "answer": 1}
    assert spoken(read(row, field_choices="notes")) == LISTED
    assert read(row, field_choices="notes").unread == {}


def test_a_key_of_an_object_is_a_column_by_its_path():
    row = {"body": {"in": {"q": "q", "lang": "en"}, "out": "a"}, "body.x": "kept"}
    found = read(row, field_question="body.in.q", field_answer="body.out")
    assert spoken(found) == ["user:q", "assistant:a"]
    assert found.unread == {"body.in.lang": "en", "body.x": "kept"}


def test_keys_name_columns_of_any_name():
    row = {"sys": "s", "notes": "c", "asked": "q", "why": "t", "said": "a", "defs": [TOOL]}
    keys = {"system": "sys", "context": "notes", "question": "asked", "thinking": "why"}
    keys |= {"answer": "said", "tools": "defs"}
    found = read(row, **{f"field_{key}": column for key, column in keys.items()})
    assert spoken(found) == ["system:s", "user:c\n\nq", "assistant:<t>a"]
    assert (len(found.tools), found.unread) == (1, {})
    thinks = {"messages": [*ASKED, GOOD[0] | {"why": "t"}]}
    assert spoken(read(thinks, field_thinking="why"))[1] == "assistant:<t>good"


def test_calls_that_stay_text_are_read_by_the_roles_that_the_refusal_names():
    turns = [("user", "q"), ("assistant", "[f(a=1)]"), ("tool", "[1]"), ("assistant", "a")]
    row = {"system": "s", "conversations": [{"from": role, "value": text} for role, text in turns]}
    with pytest.raises(RowProblem) as refused:
        read(row)
    assert "roles: {user: [tool]}" in refused.value.fix
    spelled = ["system:s", "user:q", "assistant:[f(a=1)]", "user:[1]", "assistant:a"]
    assert spoken(read(row, roles={"user": ["tool"]})) == spelled


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": ASKED, "answer": "a"}, "answer_beside"),
        ({"texts": ["q", "a"]}, "turns_by_place"),
        ({"messages": CHOSEN, "answer": "a"}, None),
        ({"messages": CHOSEN, "text": "a"}, None),
    ],
)
def test_a_reading_that_is_a_guess_is_noted(row, note):
    assert [each.id for each in read(row).notes] == ([note] if note else [])
