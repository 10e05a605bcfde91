"""What the pages show is run as it stands."""

import gc
import re

import pytest
import torch
import torch.nn.functional as F
from _pages import PAGES, README, blocks, name_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vid_loss import Distiller


class Net(nn.Module):
    """Has the names that the pages' examples tap."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer3 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.conv1(x))).mean((2, 3)))


def plain_script(_):
    """What a reader with a loop of their own has."""
    student, teacher = Net(4), Net(8)
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
    return {
        "student": student,
        "teacher": teacher,
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "dataset": TensorDataset(images, labels),
        "criterion": F.cross_entropy,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
        "torch": torch,
    }


def distilling_script(_):
    """What the same reader has after a step with the three lines."""
    script = plain_script(_)
    student, optimizer, images = script["student"], script["optimizer"], script["images"]
    distiller = Distiller(student, script["teacher"], {"layer4": "layer4"}, example=images)
    optimizer.add_param_group({"params": distiller.parameters()})
    (student(images).sum() + distiller(images)).backward()
    optimizer.step()
    return {**script, "distiller": distiller}


def hugging_face_script(folder):
    transformers = pytest.importorskip("transformers")
    student, teacher = (
        transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=8,
            )
        )
        for layers in (2, 4)
    )
    row = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [row] * 4
    names = {"student": student, "teacher": teacher, "args": args}
    return {**names, "train_set": rows, "eval_set": rows}


def accelerate_script(folder):
    pytest.importorskip("accelerate")
    script = plain_script(folder)
    del script["torch"]  # the page imports it
    samples = TensorDataset(script["images"], script["labels"])
    loader = DataLoader(samples, batch_size=2)
    return {**script, "train_loader": loader, "validation_loader": loader, "epochs": 1}


def timm_script(folder):
    timm = pytest.importorskip("timm")
    student, teacher = (
        timm.create_model(name, num_classes=5) for name in ("resnet10t", "resnet14t")
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
    return {"student": student, "teacher": teacher, "loader": [(images, labels)]}


def lightning_script(folder):
    pytest.importorskip("lightning")
    script = plain_script(folder)
    return {**script, "loader": DataLoader(script["dataset"], batch_size=2)}


def detection_script(folder):
    pytest.importorskip("torchvision")
    from detection_and_segmentation import boxed_images, detector

    student, loader = detector("resnet18"), list(boxed_images(2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    names = {"student": student, "teacher": detector("resnet34"), "images": loader[0][0]}
    return {**names, "loader": loader, "optimizer": optimizer}


SCRIPTS = {
    "integrations/hf/README.md": hugging_face_script,
    "integrations/accelerate/README.md": accelerate_script,
    "integrations/lightning/README.md": lightning_script,
    "integrations/timm/README.md": timm_script,
    "integrations/torchvision/README.md": detection_script,
}
CODE = [block for page in PAGES for block in blocks(page, "python", "diff")]


def runnable(block):
    """Returns a block's code; of a diff, what the script is afterwards."""
    if block.language == "python":
        return block.code
    lines = block.code.splitlines()
    assert all(not line or line[0] in "+- " for line in lines), block
    return "\n".join(line[1:] for line in lines if not line.startswith("-"))


def script_for(block, folder):
    """Returns the names that a reader of the block's page has in hand."""
    if name_of(block.page) in SCRIPTS:
        return SCRIPTS[name_of(block.page)](folder)
    uses, makes = (re.search(word, block.code) for word in (r"\bdistiller\b", r"\bDistiller\("))
    return distilling_script(folder) if uses and not makes else plain_script(folder)


@pytest.fixture
def one_process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # advice on workers and the like
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")  # torch's own, by its use
@pytest.mark.parametrize("block", CODE, ids=str)
def test_block_runs(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    for library in re.findall(r"^from (trl|sentence_transformers)\b", block.code, re.MULTILINE):
        pytest.importorskip(library)
    torch.manual_seed(0)
    if "DistributedDataParallel" in block.code:
        request.getfixturevalue("one_process_group")
    script = script_for(block, tmp_path)
    before = {name: p.clone() for name, p in script["student"].named_parameters()}
    exec(compile(runnable(block), str(block), "exec"), script)
    if re.search(r"optimizer\.step\(\)|\btrain\(|\.fit\(", block.code):
        after = dict(script["student"].named_parameters())
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert moved, "the block trains, and the student did not move"
    script.clear()  # the script ends, and a cache writes what it has left: here, not elsewhere
    gc.collect()


def test_the_pages_that_promise_code_have_some():
    with_code = {name_of(block.page) for block in CODE}
    assert with_code >= {"README.md", "vid_loss/README.md", *SCRIPTS}


def test_what_the_front_page_saves_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in blocks(README, "diff") if "load_state_dict" in b.code)
    saving, loading = runnable(block).split("\n\n")
    torch.manual_seed(0)
    first = distilling_script(tmp_path)
    exec(saving, first)
    torch.manual_seed(1)
    second = distilling_script(tmp_path)
    second["teacher"].load_state_dict(first["teacher"].state_dict())
    exec(loading, second)
    for script in (first, second):
        images, optimizer = first["images"], script["optimizer"]
        optimizer.zero_grad()
        (script["student"](images).sum() + script["distiller"](images)).backward()
        optimizer.step()
    for part in ("student", "distiller"):
        torch.testing.assert_close(
            second[part].state_dict(), first[part].state_dict(), rtol=0, atol=0
        )


def test_the_diff_comes_before_line_25_and_is_three_lines_and_an_import():
    diff = next(blocks(README, "diff"))
    assert diff.line < 25
    added = [line for line in diff.code.splitlines() if line.startswith("+")]
    assert added[0] == "+from vid_loss import Distiller"
    assert len(added) == 1 + 3
