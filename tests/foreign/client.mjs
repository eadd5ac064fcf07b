// node client.mjs ROUTER REQUEST_JSON [ADDRESS ...]
// Prints one JSON object: the services that reflection lists on ROUTER, the health of ROUTER and of every other ADDRESS,
// and the messages of one streamed generation on ROUTER. Knows no .proto of the mesh: reflection gives them all.
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { fileURLToPath } from "node:url";

const CREDENTIALS = grpc.credentials.createInsecure();
const LOADING = { keepCase: true, longs: Number, enums: String, oneofs: true };
const DEADLINE_MS = 60_000;

const deadline = () => new Date(Date.now() + DEADLINE_MS);
const reflectionTypes = grpc.loadPackageDefinition(
  protoLoader.loadSync(fileURLToPath(new URL("reflection.proto", import.meta.url)), LOADING),
);

function ask(stub, request) {
  return new Promise((resolve, reject) => {
    const call = stub.ServerReflectionInfo({ deadline: deadline() });
    call.on("error", reject);
    call.on("data", (response) => {
      if (response.error_response) reject(new Error(response.error_response.error_message));
      resolve(response);
      call.end();
    });
    call.write(request);
  });
}

/** A FileDescriptorSet (field 1, repeated) out of serialized FileDescriptorProtos. */
function descriptorSet(files) {
  const parts = [];
  for (const file of files) {
    const header = [0x0a];
    let size = file.length;
    for (; size > 0x7f; size >>>= 7) header.push((size & 0x7f) | 0x80);
    parts.push(Buffer.from([...header, size]), file);
  }
  return Buffer.concat(parts);
}

async function reflect(address) {
  const stub = new reflectionTypes.grpc.reflection.v1alpha.ServerReflection(address, CREDENTIALS);
  const listed = await ask(stub, { list_services: "*" });
  const services = listed.list_services_response.service.map((service) => service.name);
  const files = new Map();
  for (const name of services) {
    const response = await ask(stub, { file_containing_symbol: name });
    for (const file of response.file_descriptor_response.file_descriptor_proto) files.set(file.toString("hex"), file);
  }
  stub.close();
  const definition = protoLoader.loadFileDescriptorSetFromBuffer(descriptorSet(files.values()), LOADING);
  return { services, types: grpc.loadPackageDefinition(definition) };
}

function health(types, address) {
  const stub = new types.grpc.health.v1.Health(address, CREDENTIALS);
  return new Promise((resolve, reject) =>
    stub.Check({ service: "" }, { deadline: deadline() }, (error, response) => {
      stub.close();
      if (error) reject(error);
      else resolve(response.status);
    }),
  );
}

function generate(types, address, request) {
  const stub = new types.expertmesh.v1.GenerationService(address, CREDENTIALS);
  return new Promise((resolve, reject) => {
    const messages = [];
    const call = stub.Generate(request, { deadline: deadline() });
    call.on("data", (message) => messages.push(message));
    call.on("error", reject);
    call.on("end", () => {
      stub.close();
      resolve(messages);
    });
  });
}

const [router, request, ...others] = process.argv.slice(2);
const { services, types } = await reflect(router);
const answers = { services, health: {}, messages: [] };
for (const address of [router, ...others]) answers.health[address] = await health(types, address);
answers.messages = await generate(types, router, JSON.parse(request));
console.log(JSON.stringify(answers));
