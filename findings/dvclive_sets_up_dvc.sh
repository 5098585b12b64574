#!/usr/bin/env bash
# dvclive 3.49.1: Live(save_dvc_exp=False) in a Git repository that has never seen DVC runs `dvc init` in its root and stages the files.
# A good engineer would guess: a logger that is told to save no experiment writes into its own folder and leaves the repository alone.
# Seen on 2026-11-29, Python 3.11, dvc 3.67.1:
#   A  .dvc/.gitignore
#   A  .dvc/config
#   A  .dvcignore
#   ?? dvclive/
# Constructed with a working directory outside any repository, and an absolute dir=, it writes the same log and leaves no such files.
set -euo pipefail
export DVC_NO_ANALYTICS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q dvclive==3.49.1
git init -q "$folder/repository"
cd "$folder/repository"
git -c user.name=a -c user.email=a@b commit -q --allow-empty -m first
cat >"$folder/log.py" <<'END'
import os, sys
from dvclive import Live

outside, folder = sys.argv[1:]
home = os.getcwd()
if outside == "outside":
    os.chdir("/")
live = Live(folder, save_dvc_exp=False, dvcyaml=False)
os.chdir(home)
live.log_metric("loss", 1.0)
live.end()
END
"$folder/venv/bin/python" "$folder/log.py" outside "$folder/repository/log" 2>/dev/null
echo "constructed outside:" && git status --short | tee "$folder/outside"
"$folder/venv/bin/python" "$folder/log.py" inside "$folder/repository/dvclive" 2>/dev/null
echo "constructed inside:" && git status --short | tee "$folder/inside"
[ "$(cat "$folder/outside")" = "?? log/" ]
grep -q '^A  .dvc/config' "$folder/inside" && grep -q '^A  .dvcignore' "$folder/inside"
