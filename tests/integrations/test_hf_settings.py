"""Data sets, models, optimizers and schedulers that are set later or in unusual ways."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import numpy as np
from _asserts import assert_same_state, state_of
from _hf import LAYERS, PAIR, arguments, bert, bert_teacher, distil, logged, texts
from _hf_net import distil as distil_net
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from vid_loss.integrations.hf import VIDTrainer

from vid_loss.optimizer import HEAD_LEARNING_RATE

# ---- What is set on the trainer later ----


def test_a_train_set_that_is_set_later_sizes_the_heads(tmp_path):
    expected = distil(tmp_path)
    trainer = VIDTrainer(bert(), arguments(tmp_path), teacher=bert_teacher(), pairs=PAIR)
    assert trainer.distiller is None
    trainer.train_dataset = texts()
    for one in (expected, trainer):
        torch.manual_seed(0)
        one.train()
    assert len(logged(trainer, "transfer_loss")) == 4


def test_a_model_that_is_set_later_is_the_one_that_learns(tmp_path):
    trainer, other = distil(tmp_path), bert(seed=4)
    first, before = trainer.model, state_of(other)
    keys = list(first.state_dict())
    trainer.model = trainer.model_wrapped = other
    trainer.train()
    assert trainer.distiller.student is other
    assert len(logged(trainer, "transfer_loss")) == 4
    assert any(not torch.equal(x, before[key]) for key, x in state_of(other).items())
    assert list(first.state_dict()) == keys


def test_a_model_that_is_set_in_one_of_two_places_is_refused(tmp_path):
    trainer = distil(tmp_path)
    trainer.model = bert(seed=4)
    with pytest.raises(ValueError, match=r"trainer\.model_wrapped = trainer\.model = model"):
        trainer.train()


# ---- The state dict while the heads are there ----


def test_the_student_s_state_dict_is_its_own_all_the_time(tmp_path):
    student, plain = bert(), bert()
    trainer = distil(tmp_path, student)
    trainer.train()
    for model in (student, copy.deepcopy(student)):
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        assert list(state._metadata) == list(plain.state_dict()._metadata)
        plain.load_state_dict(state)
        model.load_state_dict(plain.state_dict())
    student.save_pretrained(tmp_path / "direct")
    _, info = type(student).from_pretrained(tmp_path / "direct", output_loading_info=True)
    assert not info["unexpected_keys"]
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier\.bias"):
        student.load_state_dict({k: x for k, x in state.items() if k != "classifier.bias"})


# ---- Optimizers and schedulers ----


def test_a_scheduler_from_before_the_heads_is_refused_with_the_line_to_write(tmp_path):
    student = bert()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = VIDTrainer(
        student,
        arguments(tmp_path),
        train_dataset=texts(),
        teacher=bert_teacher(),
        pairs=PAIR,
        optimizers=(optimizer, scheduler),
    )
    optimizer.add_param_group({"params": list(trainer.distiller.parameters())})
    before = state_of(student)
    with pytest.raises(RuntimeError, match=r"all 2 groups .*got one of 1.*trainer\.lr_scheduler"):
        trainer.train()
    assert_same_state(student, before)
    trainer.lr_scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    trainer.train()
    assert logged(trainer, "learning_rate")[1] == pytest.approx(0.05)


class ForEach(VIDTrainer):
    """Has an optimizer for each parameter, as GaLore's and APOLLO's layerwise ones."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        own = {p: torch.optim.AdamW([p], lr=args.learning_rate) for p in model.parameters()}

        def step(parameter):
            own[parameter].step()
            own[parameter].zero_grad()

        for parameter in own:
            parameter.register_post_accumulate_grad_hook(step)
        return LayerWiseDummyOptimizer, {"optimizer_dict": own, "lr": args.learning_rate}


@pytest.mark.parametrize("name", ["by hand", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
# GaLore's own AdamW, of torch's spellings of add.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_optimizer_for_each_parameter_has_the_heads_and_their_rate(tmp_path, name):
    options, cls = {"learning_rate": 1e-4}, ForEach
    if name != "by hand":
        pytest.importorskip(f"{name.split('_')[0]}_torch")
        cls = VIDTrainer
        options.update(optim=name, optim_target_modules=["attention"])
    trainer = distil(tmp_path, cls=cls, **options)
    before = state_of(trainer.distiller.losses)
    rate = {}
    create = trainer.create_optimizer

    def look(*args):
        optimizer = create(*args)
        for parameter, own in optimizer.optimizer_dict.items():
            rate[id(parameter)] = own.param_groups[0]["lr"]
        return optimizer

    trainer.create_optimizer = look
    trainer.train()
    heads = {id(p) for p in trainer.distiller.parameters()}
    assert {rate[x] for x in heads} == {HEAD_LEARNING_RATE}
    assert {rate[x] for x in rate.keys() - heads} == {1e-4}
    after = state_of(trainer.distiller.losses)
    assert not any(torch.equal(after[key], before[key]) for key in before)


# ---- The log ----


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_is_logged_by_one_rule(tmp_path, filtered, accumulation):
    calls = []

    def sometimes_nan(outputs, labels, num_items_in_batch=None):
        calls.append(None)
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
        return loss * (float("nan") if len(calls) == 4 else 1.0) * 1e-3

    trainer = distil_net(
        tmp_path,
        compute_loss_func=sometimes_nan,
        logging_nan_inf_filter=filtered,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        logging_steps=3,
        max_steps=3,
        learning_rate=0.0,
        max_grad_norm=0.0,
    )
    # A step of no size, so that what is not finite stays where it is.
    trainer.accelerator.clip_grad_norm_ = lambda *_, **__: torch.tensor(0.0)
    trainer.training_step = without_gradients(trainer)
    trainer.train()
    (loss,), (task,), (transfer,) = (
        logged(trainer, f"{x}loss") for x in ("", "task_", "transfer_")
    )
    if filtered or accumulation == 1:
        assert loss == pytest.approx(task + transfer, abs=2e-4)  # old ones log four digits
    else:
        assert not np.isfinite([loss, task]).any()


def test_a_teacher_that_overflows_ends_the_run_before_a_weight_sees_it(tmp_path):
    def overflow(module, args, output):
        if trainer.state.global_step == 2:
            hidden, *others = output if isinstance(output, tuple) else (output,)  # by its version
            hidden = hidden.clone()
            hidden[0, 0, 0] = torch.inf
            output = (hidden, *others) if isinstance(output, tuple) else hidden
        return output

    trainer = distil(tmp_path)
    layer = trainer.teacher.get_submodule(LAYERS[1])
    layer.register_forward_hook(overflow, prepend=True)
    with pytest.raises(RuntimeError, match=rf"expected finite features .* layer '{LAYERS[1]}'"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert len(logged(trainer, "loss")) == 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def without_gradients(trainer):
    step = trainer.training_step

    def run(model, *args, **kwargs):
        loss = step(model, *args, **kwargs)
        model.zero_grad()
        return loss

    return run
