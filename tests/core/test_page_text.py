"""What the pages say is there: links, files, names, options and commands."""

import importlib
import re
from itertools import chain

import pytest
from _pages import LIBRARY, PAGES, README, ROOT, blocks, name_of, prose

HISTORY = ROOT / "CHANGELOG.md"  # names what is gone
OURS = "https://github.com/vid-loss/vid-loss/blob/main/"
OUR_PICTURES = "https://raw.githubusercontent.com/vid-loss/vid-loss/main/"
LINK = re.compile(r"(?P<picture>!?)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])(?:examples|tests|vid_loss|integrations|\.ci)/[\w./-]*\w")
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def anchors(page):
    """Returns what GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def local_path(page, picture, target):
    """Returns where a link leads in this checkout and its anchor; None if it leads elsewhere.

    The package index shows the front page too, and has no other file: links from there are
    absolute. All others are relative, so that a clone's pages lead to the clone's.
    """
    address, _, anchor = target.partition("#")
    prefix = OUR_PICTURES if picture else OURS
    if page == README and address:
        assert address.startswith("https://"), f"{target}: no such file on the index's page"
    if page != README:
        assert not address.startswith((OURS, OUR_PICTURES)), f"{target}: make it relative"
    if address.startswith(prefix):
        return ROOT / address.removeprefix(prefix), anchor
    if address.startswith("https://"):
        assert not picture, f"{target}: a picture from elsewhere"
        return None
    return (page.parent / address if address else page), anchor


@every_page
def test_every_link_leads_somewhere(page):
    for link in LINK.finditer(prose(page)):
        place = local_path(page, link["picture"], link["target"])
        if place is None:
            continue
        path, anchor = place
        assert path.exists(), link["target"]
        if link["picture"]:
            assert path.suffix == ".png", link["target"]
        if anchor:
            assert anchor in anchors(path), link["target"]


@pytest.mark.parametrize(
    ("target", "message"),
    [("vid_loss/README.md", "no such file"), ("https://elsewhere.org/a.png", "from elsewhere")],
)
def test_the_front_page_may_not_link_to_what_the_index_lacks(target, message):
    with pytest.raises(AssertionError, match=message):
        local_path(README, "!", target)


def test_the_front_page_links_to_every_other_and_each_is_reached():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for link in LINK.finditer(prose(page)):
            place = local_path(page, link["picture"], link["target"])
            if place is not None:
                waiting.append(place[0].resolve())
    unreached = {name_of(page) for page in PAGES if "/discarded/" not in name_of(page)}
    assert not unreached - {name_of(page) for page in reached}


@pytest.mark.parametrize("page", [p for p in PAGES if p != HISTORY], ids=name_of)
def test_files_and_names_in_the_text_exist(page):
    text = page.read_text()
    paths = re.findall(
        r"(?<![\w/.-])(?:examples|tests|vid_loss|integrations|\.ci)/[\w./-]*\w", text
    )
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing
    for statement in re.findall(r"`(from vid_loss\S* import [^`]+)`", text):
        exec(statement, {})
    for name in re.findall(r"\bvid_loss(?:\.[A-Za-z]\w*)+\b(?!/)", prose(page)):
        resolve(name)


def resolve(name):
    """Imports a dotted name, or the module that it is an attribute of."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        module, _, attribute = name.rpartition(".")
        if not module or not name.startswith(error.name or "?"):
            raise
        return getattr(resolve(module), attribute)


def programs():
    sources = ((path, path.read_text()) for path in sorted((ROOT / "examples").glob("*.py")))
    return [path for path, source in sources if "__main__" in source]


def commands():
    """Yields the lines of every page's shell blocks that run one of the examples."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                for program in re.findall(r"examples/\w+\.py", line):
                    yield pytest.param(program, line, id=f"{block}: {line}")


@pytest.mark.parametrize(("program", "line"), list(commands()))
def test_the_options_of_a_command_exist(program, line):
    machinery = chain([ROOT / program], (ROOT / "examples" / "paper").rglob("*.py"))
    source = "\n".join(path.read_text() for path in machinery)
    after = line.partition(program)[2].partition("#")[0]
    for option in re.findall(r"(?<=\s)--([\w-]+)", after):
        assert f'"--{option}"' in source, option


def options_in_the_text():
    """Yields the options of ours that sentences name, and the folder whose sources have them."""
    for page in PAGES:
        for option in re.findall(r"`--([a-z][\w-]*)", prose(page)):
            if option.startswith("vid-"):
                yield pytest.param(option, "integrations", id=f"{name_of(page)}: {option}")
            elif page.parent in (ROOT / "examples", ROOT / "examples" / "paper"):
                yield pytest.param(option, "examples", id=f"{name_of(page)}: {option}")


@pytest.mark.parametrize(("option", "folder"), list(options_in_the_text()))
def test_options_in_the_text_exist(option, folder):
    if option != "help":
        sources = (path.read_text() for path in (ROOT / folder).rglob("*.py"))
        assert any(f'"--{option}"' in source for source in sources)


def test_every_program_has_a_row_and_every_row_a_program():
    rows = re.findall(r"^\| \[`(\w+\.py)`\]", (ROOT / "examples" / "README.md").read_text(), re.M)
    assert sorted(rows) == [path.name for path in programs()]


def test_the_map_has_every_room_of_the_library():
    rows = re.findall(r"^\| \[`(\w+(?:\.py|/))`\]", LIBRARY.read_text(), re.MULTILINE)
    folder = LIBRARY.parent
    rooms = [p.name for p in folder.glob("[!_]*.py")]
    rooms += [f"{p.parent.name}/" for p in folder.glob("*/__init__.py")]
    assert sorted(rows) == sorted(rooms)


def test_every_adapter_has_a_page_and_a_row_on_the_front_page():
    table = README.read_text()
    for adapter in (ROOT / "integrations").glob("*/__init__.py"):
        page = adapter.parent / "README.md"
        assert page in PAGES
        assert f"{OURS}{name_of(page)}" in table
        assert f"vid_loss.integrations.{adapter.parent.name} " in table


WORKS_WITH = {  # each row of the front page, where it is tested, and by what that can be known
    "a loop of your own": {"core/test_plain_loop.py": "optimizer.step()"},
    "DDP": {"integrations/_scripts.py": "DDP(distiller)"},
    "FSDP2, a compiled step": {
        "core/_q_ranks.py": "fully_shard(",
        "core/test_plain_loop.py": "torch.compile(",
    },
    "Hugging Face Trainer": {"integrations/test_hf_trainer.py": "VIDTrainer"},
    "Accelerate": {"integrations/loop_child.py": "train("},
    "Lightning": {"integrations/_lightning.py": "VIDCallback("},
    "torchvision's scripts: images, boxes, masks": {
        "integrations/_torchvision.py": "train_like_torchvision.py",
        "examples/test_detection_and_segmentation.py": "Distiller(",
    },
    "timm": {"integrations/test_timm_task.py": "VIDTask("},
    "timm's own train.py": {"integrations/test_timm_script.py": "patch(script"},
    "torch.export, ONNX, TorchScript": {"core/test_export.py": "torch.export.export("},
}


def test_every_row_of_the_front_page_is_a_test():
    table = README.read_text().partition("## Works with")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (.*?) \| .*? \| \[", table, re.MULTILINE) == list(WORKS_WITH)
    for row, places in WORKS_WITH.items():
        for path, sign in places.items():
            assert sign in (ROOT / "tests" / path).read_text(), (row, path)


def test_the_front_page_is_short_and_its_set_up_commands_are_one_line_each():
    text = README.read_text()
    assert len(text.splitlines()) <= 160
    for marker, last in (("quickstart", "examples/quickstart.py"), ("tests", "worksteal")):
        (command,) = re.findall(rf"^<!-- {marker} -->\n```bash\n(.*?)\n```$", text, re.M | re.S)
        assert command.startswith("python3 -m venv .venv && "), command
        assert command.endswith(last)
        assert "\n" not in command


@every_page
def test_a_page_begins_with_its_title_and_has_no_second(page):
    titles = re.findall(r"^# ", prose(page), re.MULTILINE)
    assert page.read_text().startswith("# ")
    assert len(titles) == 1
