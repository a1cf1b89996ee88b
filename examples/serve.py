"""Serve many masks from one model over HTTP; each request names its mask.

    curl localhost:8000 -d '{"mask": "digits", "image": "digit.png"}'

Without arguments: the network and the adapter of `maskpack demo`.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from maskpack import MaskBank, load_adapter, load_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("masks", nargs="*", default=["digits=./demo-output/adapter"], metavar="NAME=ADAPTER")
parser.add_argument("--backbone", default="demo-output/backbone.py:digits_cnn")
parser.add_argument("--weights", help="safetensors file, where the weights are your own")
parser.add_argument("--port", type=int, default=8000)
given = parser.parse_args()

own = "demo-output/backbone.safetensors" if given.backbone.startswith("demo-output/") else None
bank = MaskBank(load_backbone(given.backbone, weights=given.weights or own).model)
adapters = {name: load_adapter(ref) for name, ref in (mask.split("=", 1) for mask in given.masks)}
for name, adapter in adapters.items():
    bank.add(adapter, name)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with bank.using(asked["mask"]) as model:  # other requests wait
                found = adapters[asked["mask"]].predict(model, [asked["image"]])[0]
            status, answer = 200, {"label": found.label, "score": found.score}
        except (LookupError, OSError, TypeError, ValueError) as error:
            status, answer = 400, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


with ThreadingHTTPServer(("127.0.0.1", given.port), Handler) as server:
    print(f"{', '.join(adapters)} on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
