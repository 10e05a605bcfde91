"""``python -m vid_loss.integrations.timm patch train.py`` and ``... run train.py -- ...``."""

import sys

from ._script import main

sys.exit(main())
