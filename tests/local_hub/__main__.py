import argparse
import threading

from .server import Hub
from .store import LFS_SUFFIXES

parser = argparse.ArgumentParser(prog="python -m tests.local_hub")
parser.add_argument("--port", type=int, default=8899)
parser.add_argument("--root", required=True, help="folder for the content of the repositories")
parser.add_argument("--part-bytes", type=int, help="LFS files above this size are uploaded in parts")
parser.add_argument("--xet", action="store_true", help="accept Xet uploads (into a local:// CAS)")
parser.add_argument("--no-lfs", action="store_true", help="every file is 'regular': nothing goes through LFS or Xet")
args = parser.parse_args()

lfs = {"lfs_suffixes": (), "lfs_bytes": 2**60} if args.no_lfs else {"lfs_suffixes": LFS_SUFFIXES}
hub = Hub(args.root, part_bytes=args.part_bytes, xet=args.xet, **lfs).start(args.port)
print("ready", hub.endpoint, flush=True)
threading.Event().wait()
