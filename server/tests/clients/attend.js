// Calls a server through @grpc/grpc-js: `node attend.js ADDRESS PROTO_FOLDER`. Exits with 0 if all is
// as it should be, else says what is not.
'use strict';
const assert = require('node:assert');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [address, folder] = process.argv.slice(2);
const definition = loader.loadSync('attnserve/v1/attention.proto', { includeDirs: [folder] });
const { AttentionService } = grpc.loadPackageDefinition(definition).attnserve.v1;
const client = new AttentionService(address, grpc.credentials.createInsecure());

function request(length, model = 'causal') {
  const shape = [1, 4, length, 8];
  const elements = new Float32Array(4 * length * 8).fill(1);
  const tensor = { dtype: 'FP32', shape, data: Buffer.from(elements.buffer) };
  return { model, query: tensor, key: tensor, value: tensor };
}

function call(method, message) {
  const options = { deadline: Date.now() + 20000 };
  return new Promise((resolve, reject) => {
    client[method](message, options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function main() {
  assert.equal((await call('ListModels', {})).models.length, 1);
  for (const length of [8, 2048]) {
    const { data } = (await call('Attend', request(length))).output;
    assert.equal(data.length, 4 * length * 8 * 4);
    for (let offset = 0; offset < data.length; offset += 4) {
      assert(Math.abs(data.readFloatLE(offset) - 1) < 1e-5); // the mean of ones
    }
  }
  const many = Array.from({ length: 24 }, () => call('Attend', request(16)));
  assert.equal((await Promise.all(many)).length, 24);
  await assert.rejects(call('Attend', request(8, 'none')), (error) => {
    assert.equal(error.code, grpc.status.NOT_FOUND);
    assert.match(error.details, /^model: given 'none'/);
    return true;
  });

  const stream = client.AttendStream({ deadline: Date.now() + 20000 });
  const received = [];
  const ended = new Promise((resolve, reject) => stream.on('end', resolve).on('error', reject));
  stream.on('data', (answer) => {
    received.push(Number(answer.requestId));
    if (received.length === 20) stream.end();
    else stream.write({ requestId: received.length + 1, request: request(8) });
  });
  stream.write({ requestId: 1, request: request(8) });
  await ended;
  assert.deepEqual(received, Array.from({ length: 20 }, (_, index) => index + 1));

  const late = client.AttendStream({ deadline: Date.now() + 500 });
  const error = await new Promise((resolve) => late.on('error', resolve).on('data', () => {}));
  assert.equal(error.code, grpc.status.DEADLINE_EXCEEDED);
  client.close();
  console.log('all well');
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
