from dataclasses import dataclass
from pathlib import Path
@dataclass
class Profile:
    costs: list
    seen: list
    stood: list
@dataclass
class ProfileFile:
    path: Path
    key: str
    def load(self, deepest): return None
