import json

import pytest

from conftest import DATA
from janus.dola.prompt_files import Prompt, read_prompts

SAME = [Prompt("a dog"), Prompt("画一只狗。")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", '{"prompts": ["a dog", "画一只狗。"]}', SAME),
        ("p.json", '["a dog", "画一只狗。"]', SAME),
        ("p.json", '[{"prompt": "a dog", "id": 3}, "画一只狗。"]', [Prompt("a dog", {"id": 3}), SAME[1]]),
        ("p", '\ufeff{"prompts": ["a dog", "画一只狗。"]}', SAME),
        ("p.txt", "a dog\n\n画一只狗。", SAME),
        ("p.txt", '{"prompts": ["a"]}\r\n', [Prompt('{"prompts": ["a"]}')]),
        ("p.jsonl", '{"prompt": "a dog", "tag": "x"}\n"画一只狗。"\n', [Prompt("a dog", {"tag": "x"}), SAME[1]]),
        ("p.csv", 'id,Prompt\n1,"a dog, ""red"""\n2,画一只狗。\n',
         [Prompt('a dog, "red"', {"id": "1"}), Prompt("画一只狗。", {"id": "2"})]),
        ("p.TSV", 'Prompt\tNote\n"a" dog\tn, m\n', [Prompt('"a" dog', {"Note": "n, m"})]),
    ],
)  # fmt: skip
def test_prompts_come_in_any_of_these_forms_and_keep_their_other_columns(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, 1) == expected[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "{", "p.json: not JSON"),
        ("p.json", "{}", 'expected a list, or an object with the key "prompts"'),
        ("p.json", "3", "the prompts must be a list, found int"),
        ("p.json", '{"prompts": "a"}', "the prompts must be a list, found str"),
        ("p.json", "[]", "p.json: no prompts"),
        ("p.json", '["a", 3]', "prompts[1]: expected a string, found int"),
        ("p.json", '["a", " "]', "prompts[1]: the prompt is blank"),
        ("p.json", '[{"text": "a"}]', "prompts[0]: expected an object with \"prompt\", found ['text']"),
        ("p.jsonl", '{"prompt": "a"}\n{', "p.jsonl: line 2: not JSON"),
        ("p.txt", "\n \n", "p.txt: no prompts"),
        ("p.csv", "a,b\n1,2\n", 'expected a column "prompt", found a, b'),
        ("p.csv", "", 'expected a column "prompt", found none'),
        ("p.tsv", "Prompt\n \n", "line 2: the prompt is blank"),
        ("p.tsv", "id\tPrompt\n1\n", "line 2: expected a string, found NoneType"),
    ],
)
def test_a_bad_entry_is_named_with_its_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "count", "first", "field"),
    [
        ("PartiPrompts.tsv", 1632, "bond", {"Category": "Abstract", "Challenge": "Basic"}),
        ("geneval_metadata.jsonl", 553, "a photo of a bench", {"tag": "single_object"}),
    ],
)
def test_published_prompt_sets_are_read_as_they_are(name, count, first, field):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in JANUS_DOLA_DATA")
    prompts = read_prompts(DATA / name)
    assert len(prompts) == count and prompts[0].text == first
    assert json.loads(json.dumps(prompts[0].fields)).items() >= field.items()
