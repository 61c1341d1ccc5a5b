"""Published layouts, roles and fields: their results, refusals by name, and the tables of docs/data.md."""

import json
import re

import pytest
from paths import ROOT

from mllm_jax.data.records import fields, layouts, messages, parts
from mllm_jax.data.records.records import BadRecord, read_record

PAGE = (ROOT / "docs" / "data.md").read_text()
ASKED, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
MORE = [{"role": "user", "content": "R?"}, {"role": "assistant", "content": "B."}]
OTHERS = [ASKED, ANSWER | {"content": "C."}]
SYSTEM = {"role": "system", "content": "S"}
IMAGE, TEXT = {"type": "image", "image": "/a.png"}, {"type": "text", "text": "Q?"}
SHOWN = {"role": "user", "content": [IMAGE, TEXT]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLING, RESULT = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "{}"}
CALL_TEXT = '{"name": "f", "arguments": {"x": 1}}'


def find(name):
    return "/" + name.removeprefix("/")


def read(record):
    return read_record(record, "r", find)


def turns(*messages):
    """Turns in ShareGPT's layout."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def refused(record):
    with pytest.raises(BadRecord) as caught:
        read(record)
    return caught.value


@pytest.mark.parametrize(
    "record, messages",
    (
        ({"system": "S", "conversations": turns(ASKED, ANSWER)}, [SYSTEM, ASKED, ANSWER]),
        ({"system": "S", "messages": [SYSTEM, ASKED, ANSWER]}, [SYSTEM, ASKED, ANSWER]),
        ({"system": "", "messages": [ASKED, ANSWER]}, [ASKED, ANSWER]),
        ({"conversations": json.dumps(turns(ASKED, ANSWER))}, [ASKED, ANSWER]),
        ({"messages": json.dumps([ASKED, ANSWER])}, [ASKED, ANSWER]),
        ({"conversation": [{"human": "Q?", "assistant": "A."}], "system": "S"}, [SYSTEM, ASKED, ANSWER]),
        ({"query": "R?", "response": "B.", "history": [["Q?", "A."]], "system": "S"}, [SYSTEM, ASKED, ANSWER, *MORE]),
        ({"query": "R?", "response": "B.", "history": '[["Q?", "A."]]'}, [ASKED, ANSWER, *MORE]),
        ({"query": "<image>Q?", "response": "A.", "images": ["a.png"], "history": []}, [SHOWN, ANSWER]),
        ({"query": "Q?", "response": "A.", "image": "a.png"}, [SHOWN, ANSWER]),
        ({"instruction": "Q", "input": "R", "output": "A."}, [ASKED | {"content": "Q\nR"}, ANSWER]),
        ({"instruction": "Q?", "input": "", "output": "A.", "text": "Q? A."}, [ASKED, ANSWER]),
        ({"instruction": "Q?", "input": None, "output": "A.", "system": "S", "history": None}, [SYSTEM, ASKED, ANSWER]),
        ({"prompt": "Q?", "completion": "A."}, [ASKED, ANSWER]),
        ({"prompt": [SYSTEM, ASKED], "completion": [ANSWER]}, [SYSTEM, ASKED, ANSWER]),
        ({"prompt": [SHOWN], "completion": [ANSWER]}, [SHOWN, ANSWER]),
        ({"question": "Q?", "answer": "A.", "image": {"bytes": None, "path": "a.png"}}, [SHOWN, ANSWER]),
        ({"input": "Q?", "output": "A."}, [ASKED, ANSWER]),
        ({"messages": [ASKED, ANSWER], "prompt": "Q?"}, [ASKED, ANSWER]),
    ),
)  # fmt: skip
def test_layouts(record, messages):
    found = read(record)
    assert found["messages"] == messages and "rejected" not in found
    again = read({name: value for name, value in found.items() if name != "notes"})
    assert again == {name: value for name, value in found.items() if name != "notes"}  # what a conversion writes


@pytest.mark.parametrize(
    "record",
    (
        {"messages": [ASKED, ANSWER], "rejected_response": "C."},
        {"messages": [ASKED, ANSWER], "rejected_messages": OTHERS},
        {"query": "Q?", "response": "A.", "rejected_response": "C."},
        {"instruction": "Q?", "input": "", "chosen": "A.", "rejected": "C."},
        {"question": "Q?", "answer": "D.", "chosen": "A.", "rejected": "C."},
        {"conversations": turns(ASKED), "chosen": turns(ANSWER)[0], "rejected": {"from": "gpt", "value": "C."}},
        {"prompt": "Q?", "messages": [ASKED, ANSWER], "chosen": [ASKED, ANSWER], "rejected": OTHERS},
        {"prompt": "?", "chosen": [SYSTEM, ASKED, ANSWER], "rejected": OTHERS, "system": "S"},
    ),
)  # fmt: skip
def test_pairs(record):
    found = read(record)
    assert found["messages"][-2:] == [ASKED, ANSWER] and found["rejected"] == "C."


@pytest.mark.parametrize(
    "record, words",
    (
        ({"messages": [ASKED], "rejected": "C."}, "the chosen answer is missing"),
        ({"messages": [ASKED, CALLING, RESULT], "rejected": "C."}, "the chosen answer is missing"),
        ({"messages": [ASKED, ANSWER], "chosen": "D.", "rejected": "C."}, 'ends with another answer than "chosen"'),
        ({"messages": [ASKED, ANSWER | {"weight": 0}], "rejected": "C."}, "chosen answer has a weight; remove it"),
        (
            {"prompt": "Q?", "chosen": ANSWER | {"tool_calls": [CALL]}, "rejected": "C."},
            "must be a text without tool calls",
        ),
        ({"prompt": [ASKED], "chosen": [ANSWER, ANSWER], "rejected": "C."}, "an answer must be one message"),
    ),
)
def test_broken_pairs(record, words):
    error = refused(record)
    assert error.reason == "not a pair" and words in error.detail


@pytest.mark.parametrize(
    "record, reason, words",
    (
        ({"prompt": "Q?", "response": "A.", "output": "B."}, "several columns", "response, output have the same"),
        ({"prompt": "Q?", "question": "R?", "answer": "A."}, "several columns", "prompt, question have"),
        ({"question": "Q?", "answer": 2}, "not a conversation", '"answer" must be a text or a list of messages'),
        ({"query": "Q?", "response": "A.", "history": ["Q?"]}, "not a conversation", '"history" must be a list of'),
        ({"conversations": "hello"}, "not valid JSON", '"conversations" is a text, but not JSON'),
        ({"messages": 5}, "not a conversation", '"messages" must be a list of messages'),
        ({"messages": ["a"]}, "not a conversation", '"messages" must be a list of messages'),
        ({"system": "S", "messages": [SYSTEM | {"content": "T"}, ASKED, ANSWER]}, "two system prompts", "differ"),
        ({"messages": [SYSTEM, SYSTEM, ASKED, ANSWER]}, "wrong roles", "must come first, and alone"),
        ({"messages": [ASKED, ASKED, ANSWER]}, "wrong roles", "must take turns, got user, user"),
        ({"messages": [ASKED, ANSWER, ANSWER]}, "wrong roles", "got assistant, assistant"),
        ({"messages": [ASKED, {"role": "narrator", "content": ""}]}, "wrong roles", "unknown role 'narrator'"),
        ({"messages": [ASKED | {"from": "gpt"}, ANSWER]}, "not a conversation", "role and from of a message differ"),
        ({"messages": [ASKED | {"value": "R?"}, ANSWER]}, "not a conversation", "content and value of a message"),
        ({"messages": [ASKED]}, "wrong roles", "needs a question and an answer, got user"),
        ({"messages": [ANSWER]}, "wrong roles", "needs a question and an answer, got assistant"),
        ({"messages": []}, "wrong roles", "got no turns"),
        ({"messages": [ASKED, ANSWER], "label": False}, "answer not to be given", "is false"),
        ({"foo": 1}, "not a conversation", "another layout of docs/data.md, has foo"),
        ({"messages": [ASKED, ANSWER | {"content": None}]}, "not a conversation", '"content" must be a text, a part'),
    ),
)  # fmt: skip
def test_broken_layouts(record, reason, words):
    error = refused(record)
    assert error.reason == reason and words in error.detail


@pytest.mark.parametrize("fields", ({"image": ""}, {"image": []}, {"images": [None]}, {"images": [""], "videos": []}))
def test_empty_files_are_none(fields):
    assert read({"messages": [ASKED, ANSWER], **fields})["messages"] == [ASKED, ANSWER]
    part = [{"type": "image"} | dict.fromkeys(fields, "")]
    assert read({"images": ["a.png"], "messages": [ASKED | {"content": part}, ANSWER]})["messages"][0]["content"] == [
        IMAGE
    ]


@pytest.mark.parametrize(
    "given, expected",
    (
        ({"type": "text", "text": "Q?"}, [TEXT]),
        ([{"type": "input_text", "text": "Q?"}, {"type": "input_image", "image_url": "a.png"}], [TEXT, IMAGE]),
        ([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}], [IMAGE]),
        ([{"type": "image_url", "image_url": "a.png"}, "Q?"], [IMAGE, TEXT]),
        ([{"image": "a.png"}, {"text": "Q?"}], [IMAGE, TEXT]),
        ([{"type": "video_url", "video_url": {"url": "a.mp4"}}], [{"type": "video", "video": "/a.mp4"}]),
    ),
)  # fmt: skip
def test_parts(given, expected):
    assert read({"messages": [ASKED | {"content": given}, ANSWER]})["messages"] == [
        ASKED | {"content": expected},
        ANSWER,
    ]


@pytest.mark.parametrize("kind", ("audio", "input_audio", "file", None))
def test_parts_of_other_types_are_refused(kind):
    error = refused({"messages": [ASKED | {"content": [{"type": kind, "file": "a.wav"}]}, ANSWER]})
    assert error.reason == "not a conversation" and f"content of type {kind!r}" in error.detail


@pytest.mark.parametrize(
    "given, weight", (({"weight": 0}, 0), ({"weight": 0.5}, 0.5), ({"loss": False}, 0), ({"train": True}, 1))
)
def test_weights_of_answers(given, weight):
    pairs = {"conversation": [{"human": "Q?", "assistant": "A."} | given, {"human": "R?", "assistant": "B."}]}
    assert read(pairs)["messages"] == [ASKED, ANSWER | {"weight": weight}, *MORE]
    messages = read({"messages": [ASKED, ANSWER | given, *MORE]})["messages"]
    assert messages == [ASKED, ANSWER | {"weight": weight}, *MORE]
    assert read({"messages": messages})["messages"] == messages
    nulls = {"weight": None, "loss": None}
    assert read({"messages": [ASKED | nulls, ANSWER | nulls]})["messages"] == [ASKED, ANSWER]


@pytest.mark.parametrize(
    "record, reason",
    (
        ([ASKED, ANSWER | {"weight": -1}], "wrong weight"),
        ([ASKED, ANSWER | {"weight": float("nan")}], "wrong weight"),
        ([ASKED, ANSWER | {"weight": "1"}], "wrong weight"),
        ([ASKED, ANSWER | {"weight": 0, "loss": True}], "wrong weight"),
        ([ASKED | {"weight": 1}, ANSWER], "wrong weight"),
        ([ASKED, ANSWER | {"weight": 0}], "nothing to learn"),
    ),
)
def test_wrong_weights(record, reason):
    assert refused({"messages": record}).reason == reason


@pytest.mark.parametrize(
    "call",
    (
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": CALL_TEXT},
        {"role": "tool_call", "content": f"[{CALL_TEXT}]"},
    ),
)  # fmt: skip
@pytest.mark.parametrize("role", ("tool", "observation", "function", "tool_response", "ipython"))
def test_calls_of_tools(call, role):
    result = {"role": role, "content": "{}"}
    found = read({"tools": json.dumps([TOOL]), "messages": [ASKED, call, result, ANSWER]})
    assert found["messages"] == [ASKED, CALLING, RESULT, ANSWER] and found["tools"] == [TOOL]
    assert read(found) == found


def test_tools_and_their_answers():
    bare = {"tools": [TOOL["function"]], "messages": [ASKED, ANSWER]}
    assert (
        read(bare)["tools"] == read({"functions": [TOOL["function"]], "messages": [ASKED, ANSWER]})["tools"] == [TOOL]
    )
    assert "tools" not in read({"tools": "[]", "messages": [ASKED, ANSWER]})
    thought = ANSWER | {"content": "Let me see."}
    calls = [{"role": "tool_call", "content": CALL_TEXT}] * 2
    results = [RESULT | {"name": "f", "tool_call_id": "1"}, {"role": "tool", "content": {"y": "é"}}]
    messages = read({"messages": [ASKED, thought, *calls, *results, ANSWER]})["messages"]
    assert messages[1] == thought | {"tool_calls": [CALL, CALL]}
    assert messages[2:4] == [results[0], {"role": "tool", "content": '{"y": "é"}'}]
    assert read({"messages": [ASKED, CALLING]})["messages"] == [ASKED, CALLING]  # the call is what is learned
    named = CALLING | {"tool_calls": [CALL | {"id": "call_1"}]}
    assert read({"messages": [ASKED, named, RESULT, ANSWER]})["messages"][1] == named


@pytest.mark.parametrize(
    "call, words",
    (
        ({"name": "f", "arguments": "x"}, '"arguments of f" is a text, but not JSON'),
        ({"name": "f", "arguments": [1]}, "the arguments of f must be an object"),
        ({"arguments": {}}, 'needs objects with a "name"'),
    ),
)
def test_broken_calls(call, words):
    assert words in refused({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]}).detail
    assert words in refused({"messages": [ASKED, {"role": "tool_call", "content": json.dumps(call)}]}).detail


@pytest.mark.parametrize("name", ("reasoning_content", "reasoning", "thinking"))
def test_reasoning(name):
    messages = read({"messages": [ASKED, ANSWER | {name: "Hm."}]})["messages"]
    assert messages == [ASKED, ANSWER | {"reasoning_content": "Hm."}]


def test_what_comes_before_the_first_question_and_after_the_last_answer():
    images = {"images": ["b.png", "a.png", "c.png"]}
    first, last = ANSWER | {"content": "<image>Hello."}, ASKED | {"content": "<image>Bye."}
    found = read(images | {"messages": [SYSTEM, first, ASKED | {"content": "<image>Q?"}, ANSWER, last]})
    assert found["messages"] == [SYSTEM, SHOWN, ANSWER]
    assert found["notes"] == (messages.STARTS, messages.ENDS)
    assert read({"messages": [ASKED, CALLING, RESULT]})["notes"] == (messages.ENDS,)


@pytest.mark.parametrize(
    "fields, meant",
    (
        ({"imgae": "a.png"}, "image"),
        ({"Images": ["a.png"]}, "images"),
        ({"image_path": "a.png"}, "image"),
        ({"video_url": "a.mp4"}, "video"),
        ({"sytem": "S"}, "system"),
        ({"audois": ["a.wav"]}, "audios"),
    ),
)
def test_misspelled_fields(fields, meant):
    error = refused({"messages": [ASKED, ANSWER], **fields})
    assert error.reason == "misspelled field" and error.detail == f'"{next(iter(fields))}": did you mean "{meant}"?'


@pytest.mark.parametrize(
    "message, meant",
    (
        ({"rolle": "user", "content": "Q?"}, "role"),
        ({"role": "user", "contnet": "Q?"}, "content"),
        ({"role": "user", "content": [{"type": "image", "imgae": "a.png"}, {"type": "text", "text": "Q?"}]}, "image"),
        ({"role": "user", "content": [{"vido": "a.mp4"}]}, "video"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4", "nframe": 3}]}, "nframes"),
    ),
)
def test_misspelled_fields_of_messages_and_parts(message, meant):
    error = refused({"messages": [message, ANSWER]})
    assert error.reason == "misspelled field" and error.detail.endswith(f'did you mean "{meant}"?')


@pytest.mark.parametrize("name, meant", (("mesages", "messages"), ("converstaions", "conversations")))
def test_a_misspelled_field_is_named_where_it_leaves_no_layout(name, meant):
    assert f'did you mean "{meant}"?' in refused({name: [ASKED, ANSWER]}).detail


@pytest.mark.parametrize(
    "where, fields",
    (
        (None, {"captions": ["a"], "answers": [], "image_id": 3, "image_wh": [1, 2], "frame": 3, "tests": "t"}),
        (None, {"image": "a.png", "image_path": "x/a.png", "url": "http://example.org"}),
        (0, {"id": "m1"}),
        (1, {"name": "bot"}),
    ),
)
def test_settings_of_published_sets_are_not_refused(where, fields):
    messages = [dict(ASKED), dict(ANSWER)]
    record = {"messages": messages} | (fields if where is None else {})
    if where is not None:
        messages[where].update(fields)
    assert read(record)["messages"][1] == ANSWER


LLAVA = {"image": "a.png", "conversations": turns(ASKED | {"content": "<image>\nQ?"}, ANSWER)}
PUBLISHED = {  # fields as their cards list them, and which of these are not read
    "LLaVA-Instruct-150K": (LLAVA | {"id": "000000033471"}, ()),
    "LLaVA-OneVision-Data": (LLAVA | {"id": "1", "data_source": "ai2d"}, ()),
    "The Cauldron": (
        {"images": [{"bytes": None, "path": "a.png"}], "texts": [{"user": "Q?", "assistant": "A.", "source": "x"}]},
        (),
    ),
    "OBELICS": (
        {"images": ["a.png", None], "texts": [None, "Q?"], "metadata": "[]", "general_metadata": "{}"},
        (),
    ),
    "MMC4": (
        {
            "text_list": ["Q?"],
            "image_info": [{"image_name": "a.png", "raw_url": "u", "matched_text_index": 0, "matched_sim": 0.3}],
            "similarity_matrix": [[0.3]],
            "could_have_url_duplicate": 0,
            "url": "u",
        },
        ("could_have_url_duplicate", "similarity_matrix"),
    ),
    "RLHF-V": (
        {
            "ds_name": "RLHF-V",
            "image": {"bytes": None, "path": "a.png"},
            "text": json.dumps({"question": "Q?", "chosen": "A.", "rejected": "C."}),
            "origin_dataset": "VG",
            "origin_split": "{}",
            "idx": 0,
            "image_path": "b.jpg",
        },
        ("image_path",),
    ),
    "MMPR": (
        {
            "image": "a.png",
            "question": "<image>\nQ?",
            "chosen": "A.",
            "rejected": "C.",
            "answer_gt": "A",
            "image_wh": [],
        },
        ("answer_gt",),
    ),
    "OpenAI": (
        {"messages": [SHOWN, ANSWER | {"weight": 1}], "tools": [CALL], "parallel_tool_calls": False},
        (),
    ),
    "UltraFeedback": (
        {"images": ["a.png"], "prompt": "Q?", "prompt_id": "1", "messages": [ASKED, ANSWER], "score_chosen": 8.5},
        ("prompt", "score_chosen"),
    ),
    "LLaMA-Factory": (
        {"messages": [ASKED | {"content": "<image>Q?"}, ANSWER], "images": ["a.png"], "videos": [], "audios": []},
        (),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_records_are_read(name):
    record, unread = PUBLISHED[name]
    found = read(record)
    assert found["messages"][0]["content"] == [IMAGE, TEXT]
    assert found.get("notes", ()) == tuple(f'the field "{field}" is not read' for field in unread)


def test_unread_fields_are_noted():
    part = {"type": "text", "text": "Q?", "foo": 1, "id": 3}
    record = {
        "messages": [ASKED | {"content": [part] * 2, "mood": "x"}, ANSWER],
        "boxes": [1],
        "source": "s",
        "label": "cat",
    }
    noted = [f'the field "{name}" is not read' for name in ("boxes", "messages.mood", "content.foo")]
    assert list(read(record)["notes"]) == noted
    assert "notes" not in read({"messages": [ASKED, ANSWER], "source": "s", "label": True, "foo": None})


def listed(text):
    return set(re.findall(r"`([^`]+)`", text))


def table(head):
    rows = PAGE.split(head, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_lists_roles_and_fields():
    roles = {name: row[0] for row in table("| role | names") for name in listed(row[1])}
    calls = dict.fromkeys(("function_call", "tool_call"), messages.CALL)
    assert messages.ROLES == roles | calls
    text = PAGE.split("### Other fields", 1)[1].split("### Documents", 1)[0]
    left_out = text.split("These fields are ignored", 1)[1].split("\n\nThese")[0]
    ignored, refused_names = (
        [listed(item) for item in re.split(r"\n- of a \w+: ", block)[1:4]]
        for block in (left_out, text.split("These fields change", 1)[1].split("\n\nAnswers")[0])
    )
    kinds = fields.RECORD, fields.MESSAGE, fields.PART
    assert [kind.ignored for kind in kinds] == ignored
    beside = {*layouts.COMPLETING, *fields.ABOUT}
    assert refused_names[0] == set(fields.RECORD.refused) | beside
    assert [set(kind.refused) for kind in kinds[1:]] == refused_names[1:]
    stated = {kind: set() for kind in ("record", "turn", "part")}
    for kind, names, _ in table("| in | fields"):
        stated[kind] |= listed(names)
    read_beside = {*fields.FILES, *fields.CLIPS, *fields.ABOUT, "facts", "id", "task", "kind"}
    assert stated["record"] == read_beside
    assert stated["turn"] == set().union(*messages.READ.values()) - {"role", "from", "content", "value"}
    assert stated["part"] == {"type", *parts.ASKED}
    known = set().union(*(listed(row[0]) for row in table("| fields | contents")))
    assert known | read_beside | {"history"} == fields.FIELDS | {"id", "task", "kind"}


@pytest.mark.parametrize("kind", ("RECORD", "MESSAGE", "PART"))
def test_refused_fields_are_refused_by_name(kind):
    for name in getattr(fields, kind).refused:
        value = ["a.wav"] if kind == "RECORD" else "a"
        more = {where: {name: value} if where == kind else {} for where in ("RECORD", "MESSAGE", "PART")}
        messages = [ASKED | {"content": [TEXT | more["PART"]]} | more["MESSAGE"], ANSWER]
        error = refused({"messages": messages} | more["RECORD"])
        assert error.reason == "unsupported field" and f'"{name}"' in error.detail
        message = ASKED | {"content": [TEXT | {name: []}], name: []}
        assert "notes" not in read({"messages": [message, ANSWER], name: []})  # of no kind
    for name in layouts.COMPLETING:
        assert refused({"question": "Q?", "answer": "A.", name: "x"}).detail.startswith(f'"{name}"')
    for name in fields.ABOUT:
        assert refused({"text": "T", name: "x"}).detail.startswith(f'"{name}"')


def test_a_field_may_stand_beside_its_other_name():
    both = [ASKED | {"from": "human", "value": ASKED["content"]}, ANSWER | {"reasoning": "Hm.", "thinking": "Hm."}]
    assert read({"messages": both})["messages"] == [ASKED, ANSWER | {"reasoning_content": "Hm."}]


def test_what_a_record_asks_of_each_of_its_videos():
    asked = {"videos": ["a.mp4", "b.mp4"], "fps": [1, 2.5], "nframes": 4}
    found = read(asked | {"messages": [ASKED | {"content": "<video> or <video>?"}, ANSWER]})
    videos = [part for part in found["messages"][0]["content"] if part["type"] == "video"]
    assert [(part["video"], part["fps"], part["nframes"]) for part in videos] == [
        ("/a.mp4", 1.0, 4),
        ("/b.mp4", 2.5, 4),
    ]
    error = refused(asked | {"fps": [1, 2, 3], "messages": [ASKED | {"content": "<video> or <video>?"}, ANSWER]})
    assert error.detail == '"fps" has 3 values for 2 videos'


@pytest.mark.parametrize(
    "part, words",
    (
        ({"type": "image", "image": "a.png", "image_url": {"url": "b.png"}}, 'also has "image_url"'),
        ({"type": "text", "text": "Q?", "image": "a.png"}, 'also has "image"'),
        ({"type": "text", "text": "Q?", "video_url": "a.mp4"}, 'also has "video_url"'),
        ({"type": "image", "image": "a.png", "text": "Q?"}, 'also has "text"'),
        ({"type": "video", "video": "a.mp4", "fps": 0}, "fps must be over 0"),
        ({"type": "video", "video": "a.mp4", "nframes": 2.5}, "nframes 1 to 100,000"),
    ),
)
def test_parts_that_would_lose_something_are_refused(part, words):
    assert words in refused({"messages": [ASKED | {"content": [part]}, ANSWER]}).detail


def test_parts_of_a_table_have_every_field():
    parts = [
        {"type": "image", "image": "a.png", "text": ""},
        {"type": "text", "text": "Q?", "image": None, "video": None},
    ]
    found = read({"messages": [ASKED | {"content": parts}, ANSWER]})["messages"][0]["content"]
    assert found == [IMAGE, TEXT]


def test_the_placeholder_of_images_stands_for_videos_where_there_are_no_images():
    turn = {"from": "human", "value": "<image>\nQ?"}
    record = {"video": "a.mp4", "conversations": [turn, {"from": "gpt", "value": "A."}]}
    assert read(record)["messages"] == [ASKED | {"content": [{"type": "video", "video": "/a.mp4"}, TEXT]}, ANSWER]
    assert (
        "1 <image> for 0 files"
        in refused(record | {"conversations": [turn | {"value": "<image><video>Q?"}, ANSWER]}).detail
    )
    assert "1 <video> for 2 files" in refused(record | {"video": ["a.mp4", "b.mp4"]}).detail


def test_files_of_two_fields():
    record = {"image": "a.png", "images": ["a.png"], "messages": [ASKED, ANSWER]}
    assert read(record)["messages"] == [SHOWN, ANSWER]
    assert '"image" and "images" differ' in refused(record | {"images": ["b.png"]}).detail
