"""A stand-in for Google Cloud Storage: buckets in memory, and as much of the JSON API as is called.

gcsfs and Google's client find it by STORAGE_EMULATOR_HOST, TensorStore by TENSORSTORE_GCS_HTTP_URL.
As in the real one, an object is there whole or not at all, reads and lists see every write that is
done, there are no folders, and a write can be made to depend on an object's generation. What it
does not know it answers with 501, and remembers.
"""

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

PLACES = {  # what is called, by the path of a request
    'bucket': r'/storage/v1/b/([^/]+)',
    'objects': r'(?:/upload)?/storage/v1/b/([^/]+)/o',
    'object': r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)',
    'move': r'/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)',
}
KNOWN = {
    'alt', 'delimiter', 'fields', 'generation', 'ifGenerationMatch', 'ifGenerationNotMatch',
    'maxResults', 'name', 'prefix',
    'prettyPrint', 'projection', 'tensorstore', 'uploadType', 'upload_id',
}  # fmt: skip


class Storage(http.server.ThreadingHTTPServer):
    """`buckets[bucket][name]` is an object: its generation and its bytes."""

    daemon_threads = True

    def __init__(self, *buckets: str) -> None:
        """Serves on a free port of this machine, from a thread, until it is shut down."""
        super().__init__(('127.0.0.1', 0), Request)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.lock, self.generations = threading.Lock(), itertools.count(1)
        self.calls: list[str] = []  # 'METHOD path?query'
        self.not_known: list[str] = []
        self.refused, self.code = '^$', 403  # calls, by a pattern, and their answer
        self.before: tuple[str, Callable[[], object]] = ('^$', bool)  # pattern; what is done first
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Says nothing of clients that have gone away; a mistake shows in what they did not get."""

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Writes an object."""
        self.buckets[bucket][name] = (next(self.generations), data)


class Request(http.server.BaseHTTPRequestHandler):
    """One call of the JSON API."""

    protocol_version = 'HTTP/1.1'
    server: Storage

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self, code: int, body: Any = b'', **headers: str) -> None:
        """JSON, unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in (headers | {'Content_Length': str(len(data))}).items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, code: int, message: str) -> None:
        """An error, as the API tells it."""
        self.answer(code, {'error': {'code': code, 'message': message}})

    def serve(self) -> None:
        """Answers the call, alone at its turn."""
        url, called = urlsplit(self.path), f'{self.command} {unquote(self.path)}'
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.calls.append(called)
        if re.search(self.server.refused, called):
            return self.refuse(self.server.code, 'the caller has no permission')
        if re.search(self.server.before[0], called):
            self.server.before[1]()
        for place, pattern in PLACES.items():
            match = re.fullmatch(pattern, url.path)
            answer = getattr(self, f'{self.command}_{place}'.lower(), None)
            if match and answer and self.query.keys() <= KNOWN:
                self.bucket, *names = (unquote(part) for part in match.groups())
                if self.bucket not in self.server.buckets:
                    return self.refuse(404, 'The specified bucket does not exist.')
                with self.server.lock:
                    self.objects = self.server.buckets[self.bucket]
                    return answer(*names)
        return self.do_not_know()

    do_GET = do_POST = do_DELETE = serve  # noqa: N815

    def do_not_know(self) -> None:
        """Remembers a call that is not served."""
        self.server.not_known.append(f'{self.command} {self.path} {dict(self.headers)}')
        self.refuse(501, 'the stand-in does not know this call')

    def facts(self, name: str) -> dict[str, str]:
        """An object's metadata."""
        generation, data = self.objects[name]
        return {
            'bucket': self.bucket,
            'name': name,
            'generation': str(generation),
            'size': str(len(data)),
            'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
            'timeCreated': '2026-01-01T00:00:00.000000Z',
            'updated': '2026-01-01T00:00:00.000000Z',
        }

    def get_bucket(self) -> None:
        """Its metadata."""
        self.answer(200, {'name': self.bucket})

    def get_objects(self) -> None:
        """The first of the objects in order; names alike up to a delimiter are one prefix."""
        prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
        found: dict[str, bool] = {}  # name -> whether it is an object
        for name in sorted(self.objects):
            if name.startswith(prefix):
                head, cut, _ = name[len(prefix) :].partition(delimiter or '\0')
                found[prefix + head + cut] = not cut
        page = list(found)[: int(self.query['maxResults'])]
        items = [self.facts(name) for name in page if found[name]]
        more = {'nextPageToken': page[-1]} if len(page) < len(found) else {}
        prefixes = [name for name in page if not found[name]]
        self.answer(200, {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes} | more)

    def get_object(self, name: str) -> None:
        """Metadata or, with alt=media, the bytes of a range."""
        if name not in self.objects:
            return self.refuse(404, f'No such object: {self.bucket}/{name}')
        (generation, data), facts = self.objects[name], self.facts(name)
        if self.query.get('generation', facts['generation']) != facts['generation']:
            return self.refuse(404, f'No such object: {self.bucket}/{name}')
        if self.query.get('ifGenerationNotMatch') == str(generation):
            return self.answer(304)
        if self.query.get('alt') != 'media':
            return self.answer(200, facts)
        headers = {'x_goog_generation': facts['generation']}
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not span:
            return self.answer(200, data, **headers)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if first > last:
            return self.refuse(416, 'The requested range cannot be satisfied.')
        headers['Content_Range'] = f'bytes {first}-{last}/{len(data)}'
        return self.answer(206, data[first : last + 1], **headers)

    def delete_object(self, name: str) -> None:
        """Deletes it, if it is as the call wants it to be."""
        if self.query.get('ifGenerationMatch', '') not in (
            '',
            str(self.objects.get(name, (0,))[0]),
        ):
            self.refuse(412, 'At least one of the pre-conditions did not hold.')
        elif self.objects.pop(name, None) is None:
            self.refuse(404, f'No such object: {self.bucket}/{name}')
        else:
            self.answer(204)

    def post_objects(self) -> None:
        """An upload in one request, or announced in one and done in the next."""
        match self.query.get('uploadType'), self.headers.get('Content-Range'):
            case 'media', None:
                self.store(self.query['name'], self.body)
            case 'multipart', None:  # JSON with the name, then the data
                mark = (
                    b'--'
                    + self.headers['Content-Type'].partition('boundary=')[2].strip('"').encode()
                )
                _, facts, data, _ = self.body.split(mark)
                _, _, facts = facts.partition(b'\r\n\r\n')
                self.store(json.loads(facts)['name'], data.partition(b'\r\n\r\n')[2][:-2])
            case 'resumable', None:
                self.answer(200, Location=f'{self.server.url}{self.path}&upload_id=1')
            case 'resumable', str(span) if not span.endswith('*'):
                self.store(self.query['name'], self.body)
            case _:
                self.do_not_know()

    def post_move(self, name: str, target: str) -> None:
        """Renames an object."""
        if name in self.objects:
            self.store(target, self.objects.pop(name)[1])
        else:
            self.refuse(404, f'No such object: {self.bucket}/{name}')

    def store(self, name: str, data: bytes) -> None:
        """Makes `data` the object, if that is as the call wants it to be."""
        generation = self.objects[name][0] if name in self.objects else 0
        if self.query.get('ifGenerationMatch', str(generation)) != str(generation):
            return self.refuse(412, 'At least one of the pre-conditions did not hold.')
        self.server.put(self.bucket, name, data)
        return self.answer(200, self.facts(name))
