"""Messages of a tap: what has happened to a feature, why, and what helps.

They are looked for and written only when one of them is raised.
"""

import difflib
from typing import Any

import torch
from torch import nn

from ._layers import LayerSpec
from ._recorder import Capture, Forward, Recorder
from ._repeated import around, has_forward, repeated

_REBUILD = (
    "Change the model first (adapters, SyncBatchNorm, quantization, pruning), then build the "
    "Distiller: close this one and build it again from the model as it is now."
)
# Wrappers that return what they wrap returns, of modules inside a model.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def refuse_scripted(modules: dict[str, nn.Module], owner: str) -> None:
    """Raises the TypeError that says that TorchScript takes no hooks, or never calls them."""
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its layer {name!r} is" if name else "it is"
            raise TypeError(
                f"FeatureTap, {owner}: expected a model that takes hooks; {what} TorchScript "
                f"({type(module).__name__}). Load the Python model with the same weights. If its "
                'output is enough, wrap it in an nn.Module whose forward calls it, and tap "".'
            )


def changed_in_place(owner: str) -> str:
    """Says that the batch is no longer what the model was called with."""
    return (
        f"The batch was changed in place since the {owner} was called with it, by its own forward "
        "or by the loop, so that the teacher would see another one. Change a copy: x = x / 255, "
        f"not x.div_(255). A forward that is not yours gets one by {owner}."
        "register_forward_pre_hook(lambda _, *given: copy.deepcopy(given), with_kwargs=True)."
    )


def nothing_recorded(owner: str, recorder: Recorder, forward: Forward) -> str:
    """Says why there is no forward to take features from."""
    when = " in train mode with gradients on" if recorder.mode == "training" else ""
    first = f"The {owner} has not run forward{when} since its features were last taken"
    if forward.armed:
        return (
            f"{first}: it is still running. Call distiller(...) after {owner}(...) has returned, "
            "outside its forward."
        )
    if forward.outside:
        return (
            f"{first}: its layer {forward.outside!r} ran, but not in a call of the {owner} "
            f"itself, which is what hooks see. Call {owner}(...), not {owner}.forward(...) or a "
            "method such as forward_features or encode_image. To train one part of it alone, "
            "build the Distiller from that part, or from a module whose forward calls the method; "
            "to train what torch.fx or another converter made of it, from that."
        )
    if forward.passed:
        turn_on = f"Call {owner}.train() before it"
        if forward.passed != "in eval mode":
            turn_on = "Run it outside torch.no_grad() and torch.inference_mode()"
        return (
            f"{first}: the last forward ran {forward.passed}. {turn_on}; in evaluation use the "
            "task loss alone."
        )
    advice = f"Call {owner}(...) on the batch first, once for each loss."
    if recorder.copied:
        return (
            f"{first}. {advice} It was copied after the Distiller was built, and a copy is not "
            "read: if you train what copy.deepcopy, prepare_qat or another conversion "
            "returned, build the Distiller from that."
        )
    return (
        f"{first}. {advice} If you did, that was another model: Distiller(student, teacher) takes "
        "the one that is trained first; of one that torch.fx or a converter returned, build it "
        "anew; one that was compiled and run before it was tapped, compile again."
    )


def silent_hooks(owner: str) -> str:
    """Says why a forward that the tap itself has started was not recorded."""
    return (
        f"The {owner} ran, but not its hooks: its class has a __call__ of its own that passes them "
        "by, or it was compiled and run before the Distiller was built. Rename that __call__ to "
        "forward; or call torch._dynamo.reset(), build the Distiller, then compile it."
    )


def nested(text: str, owner: str) -> str:
    """Says what to do about a feature whose samples have lengths of their own."""
    return (
        f"Layer {text!r} of the {owner}: expected a tensor of one shape; got a nested one, whose "
        "samples have lengths of their own. Tap a layer that comes after it is padded again "
        "(to_padded_tensor)."
    )


def displaced(model: nn.Module, owner: str, spec: LayerSpec, tapped: nn.Module) -> str | None:
    """Says what stands in a tapped layer's place, or returns None if that does not matter."""
    try:
        now: Any = model.get_submodule(spec.name)
    except AttributeError:
        now = None
    while now is not tapped and (inner := _transparent(now)) is not None:
        now = inner
    if now is tapped:
        return None
    layer = f"Layer {spec.text!r} of the {owner}"
    kind, new = type(tapped).__name__, type(now).__name__
    if now is not None and any(module is tapped for module in now.modules()):
        return (
            f"{layer} was wrapped after the Distiller was built: {new} stands there now, around "
            f"the {kind}, and what it adds would learn nothing. {_REBUILD}"
        )
    if any(module is tapped for module in model.modules()):
        return None  # it has another name now, and is still what was asked for
    instead = "nothing stands there now" if now is None else f"{new} stands there now"
    return f"{layer}, {kind}, is no longer in the {owner}: {instead}. {_REBUILD}"


def _transparent(module: Any) -> nn.Module | None:
    inner = (getattr(module, name, None) for name in _TRANSPARENT)
    return next((module for module in inner if isinstance(module, nn.Module)), None)


def unreached(model: nn.Module, owner: str, spec: LayerSpec, compiled: bool, before: bool) -> str:
    """Says why the last forward did not run a layer.

    Args:
        model: the model that is tapped.
        owner: what messages call it.
        spec: the layer.
        compiled: whether the forward was a compiled one.
        before: whether an earlier forward has run the layer.
    """
    layer = f"Layer {spec.text!r} of the {owner}"
    module = model.get_submodule(spec.name)
    if isinstance(model, torch.fx.GraphModule):
        called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
        called = [name for name in called if not name.startswith("_")]  # export's own
        close = difflib.get_close_matches(spec.name, called, n=3, cutoff=0) or ["none"]
        return (
            f"{layer} was not reached: the {owner} is an exported or traced graph, which runs "
            "operations in the place of most layers. Use the model that it was made from, or tap a "
            f"layer that the graph calls; the closest: {', '.join(close)}."
        )
    if not has_forward(module):
        last = [f"{spec.name}.{key}" for key, _ in module.named_children()][-1:]
        choice = f"one of its layers, such as its last, {last[0]!r}" if last else "another layer"
        return f"{layer} is a {type(module).__name__}, which is never called. Tap {choice}."
    layerdrop = _layerdrop(model, owner)
    compiled = compiled or any(part._compiled_call_impl is not None for part in model.modules())
    if (layerdrop and model.training) or (before and not compiled):
        and_then = ", and was in one before, or in the example" if before else ""
        block = next(around(model, spec), "")
        return (
            f"{layer} was not reached in the last forward{and_then}: the {owner} skips layers at "
            "random, or chooses them by their input. Turn that off "
            f"({layerdrop or 'LayerDrop, stochastic depth'}), or tap a layer that always runs"
            + (f", such as the one around it, {block!r}." if block else ".")
        )
    if compiled:
        return (
            f"{layer} was not reached in the last forward, which was compiled. Compile the model "
            "after the Distiller is built; if models of one class are compiled in one process, set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before."
        )
    return (
        f"{layer} was not reached in the last forward. It may not be needed for this input, or be "
        "used without a call, by its forward(), its children or its weights alone, which no hook "
        f"sees. Tap a layer that is called: print(vid_loss.list_layers({owner}, example)) shows "
        "which are."
    )


def _layerdrop(model: nn.Module, owner: str) -> str:
    """What turns LayerDrop off, to be typed; "" if it is not on."""
    places = [(f"{owner}.config", getattr(model, "config", None))]
    places += [(f"{owner}.{name}".rstrip("."), module) for name, module in model.named_modules()]
    for place, holder in places:
        for key, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
            if "layerdrop" in key and isinstance(value, float) and value:
                return f"{place}.{key} = 0.0"
    return ""


def unusable(model: nn.Module, owner: str, spec: LayerSpec, capture: Capture) -> str:
    """Says why a captured feature cannot be used."""
    layer = f"Layer {spec.text!r} of the {owner}"
    if capture.calls > 1:
        return repeated(model, owner, spec, capture.calls)
    if capture.version is not None and capture.tensor._version != capture.version:
        return (
            f"{layer} was changed in place after it was read, so its feature is lost. "
            f"{_against_change(model, owner, spec)}"
        )
    if capture.without_grad == "checkpoint":
        return (
            f"{layer} was read without its gradient, inside a reentrant checkpoint. Use gradient "
            "checkpointing with use_reentrant=False, or tap the checkpoint's end."
        )
    return (
        f"{layer} was read without its gradient: the {owner} itself runs it with gradients off "
        "(torch.no_grad, detach), so the pair could teach it nothing. Tap a layer that comes later "
        f"and is trained, or take the torch.no_grad() out of the {owner}'s forward."
    )


def _against_change(model: nn.Module, owner: str, spec: LayerSpec) -> str:
    """What to do about operations in place, of which the hooks see only that there were some."""
    module, block = model.get_submodule(spec.name), next(around(model, spec), "")
    if spec.of_input and getattr(module, "inplace", False):
        return (
            f"The layer itself works in place: tap what comes out, {spec.name!r}, or set "
            f"{owner}.get_submodule({spec.name!r}).inplace = False."
        )
    other = f"the layer around it, {block!r}" if block else "a layer that comes later"
    if not spec.of_input and not any(True for _ in module.children()):
        other += f", or what goes into this one, '{spec.name}:input'"
    beside = _inplace_beside(model, spec.name)
    if beside is None:
        return (
            f"Tap {other}; or, in the forward that changes it, write x = x + y for x += y and relu "
            "for relu_."
        )
    keep = f"{owner}.get_submodule({beside!r}).inplace = False"
    if isinstance(model.get_submodule(beside.rpartition(".")[0]), nn.Sequential):
        return f"The next in-place layer is {beside!r}: tap that, or set {keep}."
    return (
        f"The next in-place layer beside it is {beside!r}: set {keep}. If that is not enough, an "
        f"operation such as x += y changes it: write x = x + y, or tap {other}."
    )


def _inplace_beside(model: nn.Module, name: str) -> str | None:
    parent, _, own = name.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    keys = [key for key, _ in children]
    for key, module in children[keys.index(own) + 1 if own in keys else 0 :]:
        if getattr(module, "inplace", False):
            return f"{parent}.{key}".lstrip(".")
    return None
