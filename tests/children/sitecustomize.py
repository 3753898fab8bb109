"""For the commands that tests start: no torch, as on a user's machine; importing it takes transformers seconds."""

import sys

sys.modules["torch"] = None
