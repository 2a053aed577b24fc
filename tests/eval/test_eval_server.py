"""The server sampler against an OpenAI-compatible server: a small one for faults, vLLM's own for agreement."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import Request, Sampling, TransformersSampler
from fura_rl.eval.server import ServerSampler

GREEDY = Sampling(max_tokens=8)


class Server(ThreadingHTTPServer):
    """Serves the tiny model over HTTP; `faults` are status codes that it answers with first."""

    daemon_threads = True

    def __init__(self, sampler, token_ids=True):
        self.sampler, self.with_token_ids, self.faults, self.bodies, self.headers = sampler, token_ids, [], [], []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:  # one model, one call at a time
            self.server.headers.append(dict(self.headers))
            if self.server.faults:
                return self.reply(self.server.faults.pop(), {"error": {"message": "not now"}})
            self.server.bodies.append(body)
            sampling = Sampling(body["temperature"], body["top_p"], body.get("top_k", 0), body["max_tokens"])
            [sample] = self.server.sampler.sample([Request(body["prompt"], sampling, body["seed"])])
        choice = {"text": sample.text, "finish_reason": sample.finish_reason}
        if self.server.with_token_ids:
            choice["token_ids"] = sample.token_ids
        self.reply(200, {"choices": [choice]})


@pytest.fixture
def serve(tiny):
    servers = []

    def start(**kwargs):
        server = Server(TransformersSampler(*tiny, 1), **kwargs)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def requests_for(tokenizer, sampling=GREEDY):
    return [Request(tokenizer(f"What is {i}?")["input_ids"], sampling, 100 + i) for i in range(10)]


def test_samples_are_those_of_the_model_behind_it(serve, tiny):
    server = serve()
    requests = requests_for(tiny[1], Sampling(temperature=1.0, top_p=0.9, top_k=20, max_tokens=8))
    heard = []
    sampler = ServerSampler(server.url, concurrency=4)
    samples = sampler.sample(requests, lambda i, s: heard.append(i))
    assert sampler.model == "tiny"
    assert samples == TransformersSampler(*tiny, 1).sample(requests)
    assert sorted(heard) == list(range(10))
    assert {body["seed"] for body in server.bodies} == set(range(100, 110))


def test_busy_answers_are_retried(serve, tiny):
    server = serve()
    sampler = ServerSampler(server.url + "/v1/", concurrency=1)
    server.faults += [503, 429]
    [sample] = sampler.sample(requests_for(tiny[1])[:1])
    assert len(sample.token_ids) == 8


def test_refusals_are_not_retried(serve, tiny):
    server = serve()
    sampler = ServerSampler(server.url, concurrency=1)
    server.faults += [400, 400]
    with pytest.raises(FuraError, match=r"answered 400 to /completions: .*not now"):
        sampler.sample(requests_for(tiny[1])[:1])
    assert server.faults == [400]


def test_key_is_sent_and_not_shown(serve, tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server = serve()
    sampler = ServerSampler(server.url, concurrency=1)
    server.faults.append(401)
    with pytest.raises(FuraError) as caught:
        sampler.sample(requests_for(tiny[1])[:1])
    assert "secret-key" not in str(caught.value)
    assert server.headers[-1]["Authorization"] == "Bearer secret-key"


def test_server_without_token_ids(serve, tiny):
    server = serve(token_ids=False)
    requests = requests_for(tiny[1])[:1]
    with pytest.raises(FuraError, match="returns no token ids"):
        ServerSampler(server.url).sample(requests)
    [sample] = ServerSampler(server.url, tokenizer=tiny[1]).sample(requests)
    assert sample.token_ids == tiny[1](sample.text)["input_ids"]


def test_unknown_model_and_unreachable_server(serve):
    server = serve()
    with pytest.raises(FuraError, match=r"does not serve 'other' \(it has tiny\)"):
        ServerSampler(server.url, "other")
    with pytest.raises(FuraError, match="cannot be reached"):
        ServerSampler("http://127.0.0.1:9", retries=1)


@pytest.fixture(scope="module")
def vllm_server(tiny_model):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--served-model-name", "tiny", "--max-model-len", "256"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    log = []
    threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
    deadline = time.monotonic() + 900
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "".join(log[-30:])
        try:
            urllib.request.urlopen(url + "/health", timeout=2)
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    yield url
    process.terminate()
    process.wait(600)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_server_agrees_with_transformers(vllm_server, tiny):
    model, tokenizer = tiny
    requests = requests_for(tokenizer)
    served = ServerSampler(vllm_server).sample(requests)
    direct = TransformersSampler(model, tokenizer, 4).sample(requests)
    assert [(s.token_ids, s.finish_reason) for s in served] == [(s.token_ids, s.finish_reason) for s in direct]
    sampled = requests_for(tokenizer, Sampling(temperature=1.0, max_tokens=8))
    assert ServerSampler(vllm_server).sample(sampled) == ServerSampler(vllm_server, "tiny").sample(sampled)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_server_refuses_a_prompt_beyond_the_context(vllm_server):
    with pytest.raises(FuraError, match="answered 400"):
        ServerSampler(vllm_server).sample([Request([5] * 300, GREEDY, 0)])
