#!/bin/sh
# Shows the program at work on a throw-away Orthanc: sh tests/demo.sh [--keep FILE | --serve]
purpose=demo
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" "$here/demo.py" "$@"
