// k6 run load.js: streams through the router's HTTP and gRPC doors.
// EXPERTMESH_HTTP (a URL) and EXPERTMESH_ROUTER (host:port) say where; HTTP_STREAMS and GRPC_STREAMS how many of each run
// at a time, DURATION (such as 300s) or ITERATIONS (of each) for how long, MAX_TOKENS how long a stream is,
// PROTO the folder of the .proto files. SUMMARY names the file for the figures.
import { check, sleep } from "k6";
import exec from "k6/execution";
import http from "k6/http";
import grpc from "k6/net/grpc";
import { Counter, Trend } from "k6/metrics";

const HTTP = __ENV.EXPERTMESH_HTTP;
const ROUTER = __ENV.EXPERTMESH_ROUTER;
const MAX_TOKENS = Number(__ENV.MAX_TOKENS || 32);
const MAX_P95_MS = Number(__ENV.MAX_P95_MS || 120000);
const PROMPT = "Once there was a small turtle";

const tokens = new Counter("tokens");
const broken = new Counter("broken_streams");
const httpStream = new Trend("http_stream_duration", true);
const httpFirst = new Trend("http_first_byte", true);
const grpcStream = new Trend("grpc_stream_duration", true);
const grpcFirst = new Trend("grpc_first_message", true);

function scenario(name, streams) {
  if (__ENV.ITERATIONS) {
    const iterations = Number(__ENV.ITERATIONS);
    return { executor: "per-vu-iterations", exec: name, vus: streams, iterations, maxDuration: "120s" };
  }
  return { executor: "constant-vus", exec: name, vus: streams, duration: __ENV.DURATION, gracefulStop: "120s" };
}

export const options = {
  scenarios: {
    http: scenario("overHttp", Number(__ENV.HTTP_STREAMS)),
    grpc: scenario("overGrpc", Number(__ENV.GRPC_STREAMS)),
    refused: scenario("refusedOnPurpose", 1),
  },
  thresholds: {
    checks: ["rate==1"],
    broken_streams: ["count==0"],
    http_req_failed: ["rate==0"],
    http_stream_duration: [`p(95)<${MAX_P95_MS}`],
    grpc_stream_duration: [`p(95)<${MAX_P95_MS}`],
    tokens: ["count>0"],
  },
  summaryTrendStats: ["avg", "min", "med", "p(95)", "p(99)", "max"],
  noConnectionReuse: false,
};

const client = new grpc.Client();
client.load([__ENV.PROTO], "expertmesh/v1/generate.proto");
let connected = false;

/** A seed of its own for each stream, so that they differ. */
function sampling() {
  return { max_tokens: MAX_TOKENS, temperature: 0.8, ignore_eos: true, seed: exec.scenario.iterationInTest };
}

export function overHttp() {
  const body = { prompt: PROMPT, stream: true, stream_options: { include_usage: true }, ...sampling() };
  const response = http.post(`${HTTP}/v1/completions`, JSON.stringify(body), {
    headers: { "content-type": "application/json" },
    timeout: "120s",
  });
  const events = (response.body || "").split("\n\n").filter((line) => line !== "");
  const usage = events.length > 1 ? JSON.parse(events[events.length - 2].slice("data: ".length)).usage : null;
  const whole = check(response, {
    "HTTP status is 200": (answer) => answer.status === 200,
    "HTTP stream is whole": () => events[events.length - 1] === "data: [DONE]",
    "HTTP stream has its tokens": () => usage !== null && usage.completion_tokens === MAX_TOKENS,
  });
  httpStream.add(response.timings.duration);
  httpFirst.add(response.timings.waiting);
  if (whole) tokens.add(MAX_TOKENS);
  else broken.add(1);
}

export function overGrpc() {
  if (!connected) {
    client.connect(ROUTER, { plaintext: true });
    connected = true;
  }
  const begun = Date.now();
  let count = 0;
  let finish = null;
  let failure = null;
  const stream = new grpc.Stream(client, "expertmesh.v1.GenerationService/Generate");
  return new Promise((resolve) => {
    const end = () => {
      const whole = check(null, {
        "gRPC status is OK": () => failure === null,
        "gRPC stream is whole": () => finish !== null,
        "gRPC stream has its tokens": () => count === MAX_TOKENS,
      });
      grpcStream.add(Date.now() - begun);
      if (whole) tokens.add(count);
      else broken.add(1);
      resolve();
    };
    stream.on("data", (message) => {
      if (count === 0) grpcFirst.add(Date.now() - begun);
      count += (message.tokenIds || []).length;
      finish = message.finish || finish;
    });
    stream.on("error", (error) => {
      failure = error;
      end();
    });
    stream.on("end", end);
    stream.write({ text: PROMPT, sampling_params: sampling() });
    stream.end();
  });
}

/** One request a second that has to be refused: the only errors there may be. */
export function refusedOnPurpose() {
  const wrong = [
    [400, { prompt: PROMPT, temperature: -1 }],
    [404, { prompt: PROMPT, model: "none" }],
    [400, { prompt: PROMPT, colour: "blue" }],
  ][exec.scenario.iterationInTest % 3];
  const response = http.post(`${HTTP}/v1/completions`, JSON.stringify(wrong[1]), {
    responseCallback: http.expectedStatuses(wrong[0]),
    tags: { name: "refused" },
  });
  check(response, { "refused as it should be": (answer) => answer.status === wrong[0] });
  sleep(1);
}

export function handleSummary(data) {
  const figures = {};
  for (const [name, metric] of Object.entries(data.metrics)) figures[name] = metric;
  const failed = Object.entries(data.metrics).flatMap(([name, metric]) =>
    Object.entries(metric.thresholds || {})
      .filter(([, threshold]) => !threshold.ok)
      .map(([rule]) => `${name}: ${rule}`),
  );
  const shown = JSON.stringify({ metrics: figures, failed_thresholds: failed });
  return __ENV.SUMMARY ? { [__ENV.SUMMARY]: shown } : { stdout: shown };
}
