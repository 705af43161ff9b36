// Microsoft's Node device client as a Plug and Play device; does and reports what azure_iot_device_client.py does.
// One JSON object on stdin: `connectionString`, `caFile`, `modelId`, `port` (of the hub on 127.0.0.1). It prints
// a JSON object a line: connected, done.
const fs = require("node:fs");
const readline = require("node:readline");
const tls = require("node:tls");

let order;
const connect = tls.connect; // the client's port is fixed in its code, and its host is a name that nobody serves
tls.connect = (options) => connect({ ...options, host: "127.0.0.1", port: order.port, servername: options.host });
const { Client, Message } = require("azure-iot-device");
const { Mqtt } = require("azure-iot-device-mqtt");

const say = (event) => console.log(JSON.stringify({ event, content: null }));

function json(text) {
  const message = new Message(text);
  message.contentType = "application/json";
  message.contentEncoding = "utf-8";
  return message;
}

async function work(client) {
  let left = 4; // two calls, a message, a change of what is desired
  async function one() {
    left -= 1;
    if (left) return;
    await client.close();
    say("done");
    process.exit(0);
  }
  await client.setOptions({ ca: fs.readFileSync(order.caFile, "utf8"), modelId: order.modelId });
  await client.open();
  say("connected");
  const twin = await client.getTwin();
  const report = (patch) =>
    new Promise((done, failed) => twin.properties.reported.update(patch, (error) => (error ? failed(error) : done())));
  const on = (name, status, answer) =>
    client.onDeviceMethod(name, async (request, response) => {
      await response.send(status, answer(request));
      await one();
    });
  on("thermostat1*getMaxMinReport", 200, () => ({ max: 22.5 }));
  on("reboot", 207, (request) => ({ echo: request.payload }));
  client.on("message", async (message) => {
    await report({ heard: { text: message.data.toString(), level: message.properties.getValue("level") } });
    await client.complete(message);
    await one();
  });
  const wanted = twin.properties.desired;
  const answer = (value, version) => ({ value, ac: 200, av: version, ad: "done" });
  const version = wanted.$version;
  const { rate, thermostat1 } = wanted;
  twin.on("properties.desired", async (changed) => {
    if (changed.$version === version) return; // it tells of the first ones as well
    await report({ rate: answer(changed.rate, changed.$version) });
    await one();
  });
  await report({
    rate: answer(rate, version),
    thermostat1: { __t: "c", target: answer(thermostat1.target, version) },
  });
  await report({ firmware: { version: "1.2" } });
  const temperature = json('{"temperature":21.5}');
  temperature.properties.add("$.sub", "thermostat1");
  await client.sendEvent(temperature);
  const plain = json('{"t":21.5}');
  plain.messageId = "m-1";
  plain.properties.add("unit", "°C & more");
  await client.sendEvent(plain);
}

readline.createInterface({ input: process.stdin }).once("line", (line) => {
  order = JSON.parse(line);
  work(Client.fromConnectionString(order.connectionString, Mqtt)).catch((error) => {
    console.error(error);
    process.exit(1);
  });
});
