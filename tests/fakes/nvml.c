/* A driver for tests: the part of libnvidia-ml.so.1 that Windtunnel and torch ask, without a GPU.
 *
 * What it answers is the text file $FAKE_NVML, read again at every call so that a test can change
 * the machine while it is watched; without the file there is no driver. Its lines:
 *   init 18                      nvmlInit returns this error
 *   driver 580.95.05             the driver's version
 *   cuda 13000                   the newest CUDA that the driver runs
 *   gpu name=NVIDIA_H100_80GB_HBM3 uuid=GPU-aa pci=00000000:3B:00.0 total=85520809984 used=1000
 *       reserved=600 cc=9.0 util=37 temp=55 power=310000 limit=700000 mig=1 procs=12:100,13:-1
 *                                one card, in one line; "_" in the name is a space; power in mW;
 *                                procs are pid:bytes, -1 where the driver does not say
 *   slice parent=GPU-aa name=... a MIG slice of a card, with the words of `gpu`
 *   err FUNCTION CODE [DEVICE]   the function fails, for one device (index or UUID) or for all
 *   hang FUNCTION MILLISECONDS   the function answers late
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { OK, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, ALREADY, NOT_FOUND,
       INSUFFICIENT_SIZE, LIBRARY_NOT_FOUND = 12, GPU_IS_LOST = 15, VERSION_MISMATCH = 25 };
enum { MOST_DEVICES = 32, MOST_LINES = 64, MOST_PROCESSES = 64 };

typedef unsigned u32;
typedef unsigned long long u64;

typedef struct {
  char name[96], uuid[96], parent[96], pci[32], processes[512];
  u64 total, used, reserved;
  int major, minor, load, heat, power, limit, mig;
} description;

/* What a caller holds: it outlives the card that it names. */
typedef struct { char uuid[96]; } handle;
typedef handle *device;

typedef struct { char function[64], device[96]; int value; } rule;

static description described[MOST_DEVICES];
static handle handles[MOST_DEVICES * 8];
static rule errors[MOST_LINES], delays[MOST_LINES];
static int devices, error_count, delay_count, initialized, init_error;
static u32 cuda;
static char driver[80];

static void describe(description *d, char **rest) {
  char *word, *value;
  memset(d, 0, sizeof *d);
  d->mig = -1;
  while ((word = strtok_r(NULL, " ", rest))) {
    if (!(value = strchr(word, '='))) continue;
    *value++ = 0;
    if (!strcmp(word, "name")) {
      snprintf(d->name, sizeof d->name, "%s", value);
      for (char *c = d->name; *c; c++) if (*c == '_') *c = ' ';
    }
    else if (!strcmp(word, "uuid")) snprintf(d->uuid, sizeof d->uuid, "%s", value);
    else if (!strcmp(word, "parent")) snprintf(d->parent, sizeof d->parent, "%s", value);
    else if (!strcmp(word, "pci")) snprintf(d->pci, sizeof d->pci, "%s", value);
    else if (!strcmp(word, "procs")) snprintf(d->processes, sizeof d->processes, "%s", value);
    else if (!strcmp(word, "cc")) sscanf(value, "%d.%d", &d->major, &d->minor);
    else if (!strcmp(word, "total")) d->total = strtoull(value, NULL, 10);
    else if (!strcmp(word, "used")) d->used = strtoull(value, NULL, 10);
    else if (!strcmp(word, "reserved")) d->reserved = strtoull(value, NULL, 10);
    else if (!strcmp(word, "util")) d->load = atoi(value);
    else if (!strcmp(word, "temp")) d->heat = atoi(value);
    else if (!strcmp(word, "power")) d->power = atoi(value);
    else if (!strcmp(word, "limit")) d->limit = atoi(value);
    else if (!strcmp(word, "mig")) d->mig = atoi(value);
  }
}

static void read_rule(rule *r, char **rest) {
  char *function = strtok_r(NULL, " ", rest), *value = strtok_r(NULL, " ", rest);
  char *target = strtok_r(NULL, " ", rest);
  snprintf(r->function, sizeof r->function, "%s", function);
  snprintf(r->device, sizeof r->device, "%s", target ? target : "");
  r->value = atoi(value);
}

static void read_state(void) {
  char line[2048], *word, *rest;
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  devices = error_count = delay_count = 0;
  init_error = file ? OK : LIBRARY_NOT_FOUND;
  cuda = 13000;
  strcpy(driver, "580.95.05");
  if (!file) return;
  while (fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    if (!(word = strtok_r(line, " ", &rest))) continue;
    if (!strcmp(word, "init")) init_error = atoi(strtok_r(NULL, " ", &rest));
    else if (!strcmp(word, "driver")) snprintf(driver, sizeof driver, "%s", strtok_r(NULL, " ", &rest));
    else if (!strcmp(word, "cuda")) cuda = (u32)atoi(strtok_r(NULL, " ", &rest));
    else if (!strcmp(word, "err")) read_rule(&errors[error_count++], &rest);
    else if (!strcmp(word, "hang")) read_rule(&delays[delay_count++], &rest);
    else if (!strcmp(word, "gpu") || !strcmp(word, "slice")) describe(&described[devices++], &rest);
  }
  fclose(file);
}

static device handle_of(const char *uuid) {
  int i = 0;
  while (handles[i].uuid[0] && strcmp(handles[i].uuid, uuid)) i++;
  snprintf(handles[i].uuid, sizeof handles[i].uuid, "%s", uuid);
  return &handles[i];
}

static description *find(device d) {
  for (int i = 0; d && i < devices; i++) if (!strcmp(described[i].uuid, d->uuid)) return &described[i];
  return NULL;
}

/* The n-th device whose parent is `parent` ("" for cards). */
static description *nth(u32 n, const char *parent) {
  for (int i = 0; i < devices; i++)
    if (!strcmp(described[i].parent, parent) && !n--) return &described[i];
  return NULL;
}

static int ruled(const char *function, const char *uuid, int index) {
  char number[12];
  snprintf(number, sizeof number, "%d", index);
  for (int i = 0; i < error_count; i++) {
    if (strcmp(errors[i].function, function)) continue;
    if (!errors[i].device[0] || !strcmp(errors[i].device, uuid) || !strcmp(errors[i].device, number))
      return errors[i].value;
  }
  return OK;
}

static int index_of(device d) {
  int index = 0;
  for (int i = 0; i < devices; i++) {
    if (!strcmp(described[i].uuid, d->uuid)) return described[i].parent[0] ? -1 : index;
    if (!described[i].parent[0]) index++;
  }
  return -1;
}

/* What every call does first. */
static int begin(const char *function, device d) {
  read_state();
  for (int i = 0; i < delay_count; i++) if (!strcmp(delays[i].function, function)) {
    struct timespec pause = {delays[i].value / 1000, delays[i].value % 1000 * 1000000L};
    nanosleep(&pause, NULL);
  }
  if (!initialized) return UNINITIALIZED;
  if (d && !find(d)) return GPU_IS_LOST;
  return ruled(function, d ? d->uuid : "", d ? index_of(d) : -1);
}

#define BEGIN(d) do { int code = begin(__func__, d); if (code) return code; } while (0)

int nvmlInitWithFlags(u32 flags) {
  (void)flags;
  int code = begin("nvmlInitWithFlags", NULL);
  if (code != OK && code != UNINITIALIZED) return code;
  if (!init_error) initialized++;
  return init_error;
}
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return initialized ? (initialized--, OK) : UNINITIALIZED; }

const char *nvmlErrorString(int code) {
  switch (code) {
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case GPU_IS_LOST: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Fake error";
  }
}

int nvmlSystemGetDriverVersion(char *text, u32 size) { BEGIN(NULL); snprintf(text, size, "%s", driver); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(u32 *version) { BEGIN(NULL); *version = cuda; return OK; }

int nvmlDeviceGetCount_v2(u32 *count) {
  BEGIN(NULL);
  for (*count = 0; nth(*count, ""); ++*count) {}
  return OK;
}
int nvmlDeviceGetHandleByIndex_v2(u32 index, device *d) {
  BEGIN(NULL);
  description *found = nth(index, "");
  if (!found) return INVALID_ARGUMENT;
  *d = handle_of(found->uuid);
  return ruled(__func__, found->uuid, (int)index);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *d) {
  BEGIN(NULL);
  handle wanted;
  snprintf(wanted.uuid, sizeof wanted.uuid, "%s", uuid);
  description *found = find(&wanted);
  if (!found) return NOT_FOUND;
  *d = handle_of(found->uuid);
  return ruled(__func__, found->uuid, index_of(*d));
}
int nvmlDeviceGetIndex(device d, u32 *index) { BEGIN(d); *index = (u32)index_of(d); return OK; }
int nvmlDeviceGetName(device d, char *text, u32 size) { BEGIN(d); snprintf(text, size, "%s", find(d)->name); return OK; }
int nvmlDeviceGetUUID(device d, char *text, u32 size) { BEGIN(d); snprintf(text, size, "%s", find(d)->uuid); return OK; }

typedef struct { u64 total, free, used; } memory;
typedef struct { u32 version; u64 total, reserved, free, used; } memory_v2;

/* The first version counts what the driver reserves as used. */
int nvmlDeviceGetMemoryInfo(device d, memory *m) {
  BEGIN(d);
  const description *it = find(d);
  m->total = it->total;
  m->used = it->used + it->reserved;
  m->free = m->total - m->used;
  return OK;
}
int nvmlDeviceGetMemoryInfo_v2(device d, memory_v2 *m) {
  BEGIN(d);
  const description *it = find(d);
  if (m->version != (sizeof *m | 2u << 24)) return VERSION_MISMATCH;
  m->total = it->total;
  m->reserved = it->reserved;
  m->used = it->used;
  m->free = m->total - m->used - m->reserved;
  return OK;
}
int nvmlDeviceGetCudaComputeCapability(device d, int *major, int *minor) {
  BEGIN(d);
  *major = find(d)->major;
  *minor = find(d)->minor;
  return OK;
}
int nvmlDeviceGetUtilizationRates(device d, u32 *rates) {
  BEGIN(d);
  rates[0] = (u32)find(d)->load;
  rates[1] = 0;
  return OK;
}
int nvmlDeviceGetTemperature(device d, int sensor, u32 *heat) { (void)sensor; BEGIN(d); *heat = (u32)find(d)->heat; return OK; }
int nvmlDeviceGetPowerUsage(device d, u32 *power) { BEGIN(d); *power = (u32)find(d)->power; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(device d, u32 *limit) { BEGIN(d); *limit = (u32)find(d)->limit; return OK; }

int nvmlDeviceGetMigMode(device d, u32 *current, u32 *pending) {
  BEGIN(d);
  if (find(d)->mig < 0) return NOT_SUPPORTED;
  *current = *pending = (u32)find(d)->mig;
  return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(device d, u32 *count) { BEGIN(d); *count = find(d)->mig < 0 ? 0 : 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device d, u32 index, device *slice) {
  BEGIN(d);
  description *found = nth(index, d->uuid);
  if (!found) return NOT_FOUND;
  *slice = handle_of(found->uuid);
  return OK;
}

typedef struct { u32 pid; u64 memory; u32 gpu_instance, compute_instance; } process;

int nvmlDeviceGetComputeRunningProcesses_v3(device d, u32 *count, process *out) {
  BEGIN(d);
  process found[MOST_PROCESSES];
  char text[512], *rest, *word;
  u32 n = 0;
  strcpy(text, find(d)->processes);
  for (word = strtok_r(text, ",", &rest); word && n < MOST_PROCESSES; word = strtok_r(NULL, ",", &rest), n++) {
    long long bytes;
    memset(&found[n], 0xff, sizeof found[n]);
    sscanf(word, "%u:%lld", &found[n].pid, &bytes);
    found[n].memory = bytes < 0 ? ~0ull : (u64)bytes;
  }
  if (n && (!out || *count < n)) { *count = n; return INSUFFICIENT_SIZE; }
  if (out) memcpy(out, found, n * sizeof *found);
  *count = n;
  return OK;
}
