"""The optimizer service as a `torch.optim.Optimizer`. Of this package, only this part needs torch.

```
optimizer.py    RemoteOptimizer: step, groups, checkpoints
local.py        LocalSteps: many local steps, then a push of what they changed
rules.py        rules and hyperparameters: torch's names and defaults, and what the server holds
names.py        parameters and groups: what they are called, which of them the server keeps
groups.py       the groups of an optimizer beside those of the server
link.py         the parameters between a model and its session
tensors.py      tensors to arrays and back, without copies
state.py        the server's optimizer state as torch's state_dict, and back
pending.py      a step under way
```
"""

from gradpost.torch.local import LocalSteps
from gradpost.torch.optimizer import RemoteOptimizer
from gradpost.torch.pending import Pending

__all__ = ["LocalSteps", "Pending", "RemoteOptimizer"]
