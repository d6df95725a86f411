"""Stands in for vLLM's server: the endpoints the benchmark uses, a child process that will not end by itself.

    python stub_server.py MODE [FLAGS] --host HOST --port PORT

MODE: `serve`; `fuse`: with the plugin's metrics; `reuse`: with those of compute reuse, too; `die`: fail like a server
in start-up; `mute`: never answer; `refuse`: never empty the cache; `together`: the first answer waits behind its first
token until `OTHERS` more are asked for.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = sys.argv[1]
STUBBORN = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(600)"
METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 0.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0",model_name="m"}} {done}.0
# TYPE vllm:prompt_tokens_by_source counter
vllm:prompt_tokens_by_source_total{{engine="0",model_name="m",source="local_compute"}} {prompt}.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {generated}.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} {done}.0
vllm:time_to_first_token_seconds_count{{engine="0",model_name="m"}} {done}.0
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="m"}} 1.0
"""
PLUGIN = "".join(
    f"# TYPE jointkv_{name} counter\njointkv_{name}_total {{done}}.0\n"
    for name in ("pages_freed", "compare_seconds", "schedule_seconds", "apply_seconds")
)
REUSE = "".join(
    f"# TYPE jointkv_{name} counter\njointkv_{name}_total {{done}}.0\n"
    for name in (
        "prompt_tokens_skipped",
        "reuse_audits",
        "reuse_audited_blocks",
        "reuse_plan_seconds",
        "licences_granted",
    )
)
REUSE += '# TYPE jointkv_licences gauge\njointkv_licences{{state="granted"}} 1.0\n'
served = {"done": 0, "prompt": 0, "generated": 0}
lock = threading.Lock()
resets = 0
OTHERS, PATIENCE_SECONDS = 3, 60.0
asked, all_are_there = 0, threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        page = METRICS + PLUGIN * (MODE in ("fuse", "reuse")) + REUSE * (MODE == "reuse")
        self.answer(page.format(**served).encode() if self.path == "/metrics" else b"")

    def do_POST(self):
        global resets
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.startswith("/reset_prefix_cache?reset_external=true"):
            resets += 1
            self.answer(json.dumps({"success": MODE != "refuse" and resets > 1}).encode())
        elif self.path == "/v1/completions" and body.get("stream"):
            self.complete(body)
        elif self.path == "/v1/completions":
            with lock:
                served["done"] += 1
            self.answer(b"{}")
        else:
            self.send_error(404)

    def complete(self, body):
        """One token every 10 ms, as vLLM streams them; the first is special, if that is asked for."""
        global asked
        with lock:
            asked += 1
            first = MODE == "together" and asked == 1
            if asked > OTHERS:
                all_are_there.set()
        tokens = body["max_tokens"]
        parts = [{"choices": [{"text": f" {number}"}]} for number in range(1, tokens)]
        parts.insert(0, {"choices": [{"text": " 0" if body.get("skip_special_tokens", True) else "<s>"}]})
        parts.append({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}})
        self.send_response(200)
        self.end_headers()
        for part in parts:
            self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.01)
            if first:
                all_are_there.wait(PATIENCE_SECONDS)
        self.wfile.write(b"data: [DONE]\n\n")
        with lock:
            served["done"] += 1
        served["prompt"] += len(body["prompt"])
        served["generated"] += tokens
        computed = len(body["prompt"]) + tokens - 1 + 7  # 7 of them a second time
        line = f"Iteration({served['done']}): 1 context requests, {computed} context tokens, 0 generation requests, "
        print(line + "0 generation tokens, iteration elapsed time: 1.00 ms, CPU KV cache usage: 2.0%", flush=True)

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    print("loading", flush=True)
    if MODE == "die":
        print("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:12] ValueError: no room for the KV cache")
        print("(EngineCore pid=7)   warnings.warn('something else')")
        print("[W1121 08:45:23.18 utils.cpp:68] Warning: memory is bound")
        print("nanobind: leaked 4 instances!", flush=True)
        raise RuntimeError("Engine core initialization failed")
    child = subprocess.Popen([sys.executable, "-c", STUBBORN])
    if MODE == "mute":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
