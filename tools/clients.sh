#!/usr/bin/env bash
# Prepares build/clients: a Python environment for each extra that begins with `clients`, named after it, and JavaScript's
# packages where there is npm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

folder=build/clients
made_from="$(cat pyproject.toml tests/clients/package.json | cksum) $PWD"
[ "$(cat "$folder/installed" 2>/dev/null)" != "$made_from" ] || exit 0

printf '==> Installing clients into %s (a few minutes the first time)\n' "$folder"
# Only what the extra names: the clients talk to a server and need none of our own requirements.
.venv/bin/python - "$folder" <<'END'
import sys, tomllib, venv
from pathlib import Path

for extra, packages in tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"].items():
    if extra.startswith("clients"):
        venv.create(Path(sys.argv[1], extra), clear=True, with_pip=True)
        Path(sys.argv[1], extra, "requirements.txt").write_text("\n".join(packages) + "\n")
END
for extra in "$folder"/clients*/; do
  "$extra/bin/python" -m pip install --disable-pip-version-check --no-input -q -r "$extra/requirements.txt"
done
if command -v npm >/dev/null && command -v node >/dev/null; then
  cp tests/clients/package.json "$folder/"
  (cd "$folder" && npm install --no-audit --no-fund --loglevel=error)
else
  printf '==> No npm here: only Python clients\n'
fi
printf '%s\n' "$made_from" >"$folder/installed"
