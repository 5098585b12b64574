#!/usr/bin/env bash
# dvclive 3.49.1: Live(save_dvc_exp=False) in a Git repository that has never seen DVC runs `dvc init` in its root and stages the files.
# A good engineer would guess: a logger that is told to save no experiment writes into its own folder and leaves the repository alone.
# Seen on 2026-11-29, Python 3.11, dvc 3.67.1:
#   constructed outside:
#   ?? dvclive/
#   constructed inside:
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
"$folder/venv/bin/pip" install -q dvclive==3.49.1 dvc==3.67.1
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
for where in outside inside; do
  git init -q "$folder/$where"
  cd "$folder/$where"
  git -c user.name=a -c user.email=a@b commit -q --allow-empty -m first
  "$folder/venv/bin/python" "$folder/log.py" $where "$folder/$where/dvclive" >/dev/null
  echo "constructed $where:" && git status --short
done | tee "$folder/seen"
grep '^#   ' "$0" | cut -c5- | diff - "$folder/seen"
