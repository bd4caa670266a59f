"""The metadata service of a VM of the fake, at its link-local address: name, Scheduled Events, and tokens.

python -I -S imds.py NAME TOKEN_FILE EVENTS_FILE        (standard library only; in the VM's namespace)
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    name, token, events = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if self.headers.get("Metadata") != "true":
                self.send_error(400, "Required metadata header not specified")
                return
            if path == "/metadata/instance/compute/name":
                text = name
            elif path == "/metadata/instance":
                text = json.dumps({"compute": {"name": name, "azEnvironment": "AzurePublicCloud"}})
            elif path == "/metadata/scheduledevents":
                text = events.read_text()
            elif path == "/metadata/identity/oauth2/token":
                until = str(int(time.time()) + 86400)
                token_facts = {"access_token": token.read_text(), "expires_on": until, "expires_in": "86399"}
                text = json.dumps({**token_facts, "resource": "https://management.azure.com", "token_type": "Bearer"})
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: object) -> None:
            pass

    ThreadingHTTPServer(("169.254.169.254", 80), Handler).serve_forever()


if __name__ == "__main__":
    main()
