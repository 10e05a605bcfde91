"""What an old version of a dependency gets wrong by itself."""

import pytest
import torch

needs_gloo_that_averages = pytest.mark.skipif(
    torch.__version__ < (2, 9),
    reason="torch 2.8's gloo sums where FSDP2 asks for the average: plain FSDP2 is wrong on CPU",
)

needs_strict_export_with_hooks = pytest.mark.skipif(
    torch.__version__ < (2, 10),
    reason="strict export of torch up to 2.9 does not find the parameters of a layer with hooks",
)
needs_onnx_by_dynamo = pytest.mark.skipif(
    torch.__version__ < (2, 9),
    reason="torch 2.8 with onnxscript of today exports no convolution, with hooks or without",
)

needs_messages_of_compiled_code = pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="torch up to 2.11 hides the message of an error that its compiler meets",
)

# The example goes through the model as it is: torch 2.12 warns that it has compiled nothing.
warns_that_nothing_is_compiled = pytest.mark.filterwarnings(
    "ignore:torch.compile with fullgraph=True found no compiled frames:UserWarning"
)
