# Sourced by the other scripts: environment FOLDER PACKAGE...  makes a venv of its own for a peer.
environment() {
  python3 -m venv "$1"
  "$1/bin/python" -m pip install -q torch==2.13.0 numpy
  "$1/bin/python" -m pip install -q torch==2.13.0 "${@:2}"
}
