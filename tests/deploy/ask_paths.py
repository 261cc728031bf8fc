"""Ask a SuperLink for paths: `ask_paths.py PORT CA`, with `METHOD PATH` lines on the input.

Prints an object of the statuses. CA is `-` without TLS.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys


def main(port: str, ca: str) -> None:
    statuses = {}
    for line in sys.stdin:
        method, path = line.split()
        if ca == "-":
            link = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        else:
            context = ssl.create_default_context(cafile=ca)
            link = http.client.HTTPSConnection("127.0.0.1", int(port), timeout=30, context=context)
        headers = {"content-type": "application/x-protobuf"}
        link.request(method, path, body=b"" if method == "POST" else None, headers=headers)
        statuses[line.strip()] = link.getresponse().status
        link.close()
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
